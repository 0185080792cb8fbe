#include "ffn/column_sums.cuh"

#include "device/tensor.cuh"

namespace fastattn::ffn {
namespace {

using torch::headeronly::ScalarType;

template <class In, class Out, bool vectors>
void launch_column_sums(const ColumnSumsParams<In, Out>& params, int64_t parts, Stream stream) {
  using Traits = ColumnSumsTraits<In, Out, vectors>;
  auto p = params;
  p.column_blocks = (p.columns + Traits::columns - 1) / Traits::columns;
  launch(column_sums_kernel<Traits>, "ffn_column_sums", Grid{parts * p.column_blocks},
         Traits::threads, Traits::shared_bytes, stream, p);
}

template <class In, class Out>
void sum_as(const Tensor& sums, const Tensor& matrix, int64_t rows_per_part) {
  const OnDevice on(matrix);
  ColumnSumsParams<In, Out> p;
  p.matrix = input<In>(matrix);
  p.sums = output<Out>(sums);
  p.rows = matrix.size(0);
  p.columns = static_cast<int>(matrix.size(1));
  p.row_stride = matrix.stride(0);
  p.column_stride = matrix.stride(1);
  p.rows_of_a_part = rows_per_part;
  constexpr int width = 16 / sizeof(In);
  const bool vectors = p.column_stride == 1 && p.columns % width == 0 &&
                       p.row_stride % width == 0 &&
                       reinterpret_cast<uintptr_t>(matrix.data_ptr()) % 16 == 0;
  const int64_t parts = sums.numel() / std::max(p.columns, 1);
  if (vectors) return launch_column_sums<In, Out, true>(p, parts, on.stream());
  launch_column_sums<In, Out, false>(p, parts, on.stream());
}

}  // namespace

// sums[i] = the sum of the rows i rows_per_part to (i + 1) rows_per_part of the matrix.
void column_sums(Tensor sums, Tensor matrix, int64_t rows_per_part) {
  const ScalarType in = matrix.scalar_type(), out = sums.scalar_type();
  constexpr ScalarType half = ScalarType::Half, bf16 = ScalarType::BFloat16;
  constexpr ScalarType f32 = ScalarType::Float;
  if (in == half && out == f32) return sum_as<half_t, float>(sums, matrix, rows_per_part);
  if (in == bf16 && out == f32) return sum_as<bfloat16_t, float>(sums, matrix, rows_per_part);
  if (in == f32 && out == f32) return sum_as<float, float>(sums, matrix, rows_per_part);
  if (in == f32 && out == half) return sum_as<float, half_t>(sums, matrix, rows_per_part);
  if (in == f32 && out == bf16) return sum_as<float, bfloat16_t>(sums, matrix, rows_per_part);
  throw std::runtime_error("fastattn: ffn_column_sums of these dtypes is not compiled");
}

}  // namespace fastattn::ffn

STABLE_TORCH_LIBRARY_FRAGMENT(fastattn_cuda, m) {
  m.def("ffn_column_sums(Tensor(a!) sums, Tensor matrix, int rows_per_part) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastattn_cuda, FA_DISPATCH_KEY, m) {
  m.impl("ffn_column_sums", TORCH_BOX(&fastattn::ffn::column_sums));
}
