// Tensors of the norms, whose element type is a number that the kernel looks at.
//
// x, residual, stream, out, weight, bias and their gradients may be float16, bfloat16 or float32
// each: a template over every mixture would be hundreds of kernels. Instead everything is kept in
// registers as the 32-bit words that were read (one float32 or two 16-bit numbers a word), and
// turned into float32 where it is used. How is a branch that all threads take alike, and no load
// waits for it: a row's loads are on their way before the first word is looked at. The mixtures
// that matter, all streams of one type, are compiled with that type (`Known`): there the branches
// vanish. The type of the weights is always looked at: they lie in the L1 cache.
#pragma once

#include "device/math.cuh"
#include "device/memory.cuh"

namespace fastattn {

enum class Element : int { float32, float16, bfloat16 };

// A tensor that is read, or null; one that is written, or null.
struct Source {
  Global<const unsigned char> bytes;
  Element element;
  FA_HOST_DEVICE explicit operator bool() const { return static_cast<bool>(bytes); }
};
struct Sink {
  Global<unsigned char> bytes;
  Element element;
  FA_HOST_DEVICE explicit operator bool() const { return static_cast<bool>(bytes); }
};

// A kernel knows the type of its streams when it is compiled, or it does not.
template <Element Type>
struct Known {
  static constexpr bool two_a_word = Type != Element::float32;
  FA_DEVICE static Element element(Element) { return Type; }
};
struct Unknown {
  static constexpr bool two_a_word = false;
  FA_DEVICE static Element element(Element given) { return given; }
};

// V neighbouring elements as they were read. A lone 16-bit element is the lower half of its word.
template <class Type, int V>
struct Raw {
  static constexpr int size = Type::two_a_word && V > 1 ? V / 2 : V;
  uint32_t words[size] = {};
};

// `count` words in accesses of at most 16 bytes.
template <int Count>
FA_DEVICE void load_words(uint32_t* words, Global<const uint32_t> from) {
  constexpr int step = Count < 4 ? Count : 4;
  FA_UNROLL
  for (int first = 0; first < Count; first += step) {
    Vector<uint32_t, step> part;
    if constexpr (step == 4) {
      part = load_vector_once<step>(from + first);
    } else {
      part = load_vector<step>(from + first);
    }
    FA_UNROLL
    for (int i = 0; i < step; ++i) words[first + i] = part[i];
  }
}
template <int Count>
FA_DEVICE void store_words(Global<uint32_t> to, const uint32_t* words) {
  constexpr int step = Count < 4 ? Count : 4;
  FA_UNROLL
  for (int first = 0; first < Count; first += step) {
    Vector<uint32_t, step> part;
    FA_UNROLL
    for (int i = 0; i < step; ++i) part[i] = words[first + i];
    store_vector(to + first, part);
  }
}

// V elements from `offset` on, aligned to V elements, of memory that nobody writes meanwhile.
template <class Type, int V>
FA_DEVICE Raw<Type, V> load_raw(const Source& from, int64_t offset) {
  Raw<Type, V> raw;
  if (Type::element(from.element) == Element::float32) {
    if constexpr (!Type::two_a_word) {
      const Global<const uint32_t> place = place_as<const uint32_t>(from.bytes) + offset;
      if constexpr (V == 1) {
        raw.words[0] = load(place);
      } else {
        load_words<V>(raw.words, place);
      }
    }
  } else {
    const Global<const uint16_t> place = place_as<const uint16_t>(from.bytes) + offset;
    if constexpr (V == 1) {
      raw.words[0] = load(place);
    } else {
      load_words<V / 2>(raw.words, place_as<const uint32_t>(place));
    }
  }
  return raw;
}

template <class T, int V>
FA_DEVICE void unpack_all(const uint32_t* words, float (&values)[V]) {
  if constexpr (V == 1) {
    float none;
    unpack<T>(words[0], values[0], none);
  } else {
    FA_UNROLL
    for (int i = 0; i < V; i += 2) unpack<T>(words[i / 2], values[i], values[i + 1]);
  }
}

template <class Type, int V>
FA_DEVICE void to_floats(const Raw<Type, V>& raw, Element given, float (&values)[V]) {
  const Element element = Type::element(given);
  if (element == Element::float16) {
    unpack_all<half_t>(raw.words, values);
  } else if (element == Element::bfloat16) {
    unpack_all<bfloat16_t>(raw.words, values);
  } else if constexpr (!Type::two_a_word) {
    FA_UNROLL
    for (int i = 0; i < V; ++i) values[i] = bits_float(raw.words[i]);
  }
}

template <class T, int V>
FA_DEVICE void pack_all(uint32_t* words, const float (&values)[V]) {
  if constexpr (V == 1) {
    words[0] = pack<T>(values[0], 0.0f);
  } else {
    FA_UNROLL
    for (int i = 0; i < V; i += 2) words[i / 2] = pack<T>(values[i], values[i + 1]);
  }
}

// Rounded to an element type, to nearest even.
template <class Type, int V>
FA_DEVICE Raw<Type, V> from_floats(const float (&values)[V], Element given) {
  Raw<Type, V> raw;
  const Element element = Type::element(given);
  if (element == Element::float16) {
    pack_all<half_t>(raw.words, values);
  } else if (element == Element::bfloat16) {
    pack_all<bfloat16_t>(raw.words, values);
  } else if constexpr (!Type::two_a_word) {
    FA_UNROLL
    for (int i = 0; i < V; ++i) raw.words[i] = float_bits(values[i]);
  }
  return raw;
}

template <class Type, int V>
FA_DEVICE void store_raw(const Sink& to, int64_t offset, const Raw<Type, V>& raw) {
  if (Type::element(to.element) == Element::float32) {
    if constexpr (!Type::two_a_word) {
      const Global<uint32_t> place = place_as<uint32_t>(to.bytes) + offset;
      if constexpr (V == 1) {
        store(place, raw.words[0]);
      } else {
        store_words<V>(place, raw.words);
      }
    }
  } else {
    const Global<uint16_t> place = place_as<uint16_t>(to.bytes) + offset;
    if constexpr (V == 1) {
      store(place, static_cast<uint16_t>(raw.words[0]));
    } else {
      store_words<V / 2>(place_as<uint32_t>(place), raw.words);
    }
  }
}

template <class Type, int V>
FA_DEVICE void store_floats(const Sink& to, int64_t offset, const float (&values)[V]) {
  store_raw(to, offset, from_floats<Type>(values, to.element));
}

// V elements of a weight as float32, through the L1 cache; `otherwise` for a tensor that is not
// there.
template <int V>
FA_DEVICE void load_weights(const Source& from, int column, float otherwise, float (&values)[V]) {
  if (!from) {
    FA_UNROLL
    for (int i = 0; i < V; ++i) values[i] = otherwise;
  } else if constexpr (V == 1) {
    to_floats(load_raw<Unknown, V>(from, column), from.element, values);
  } else if (from.element == Element::float32) {
    const Global<const float> place = place_as<const float>(from.bytes) + column;
    FA_UNROLL
    for (int first = 0; first < V; first += 4) {
      const Vector<float, 4> part = load_vector<4>(place + first);
      FA_UNROLL
      for (int i = 0; i < 4; ++i) values[first + i] = part[i];
    }
  } else {
    const Global<const uint16_t> place = place_as<const uint16_t>(from.bytes) + column;
    const auto part = load_vector<V / 2>(place_as<const uint32_t>(place));
    if (from.element == Element::float16) {
      unpack_all<half_t>(part.values, values);
    } else {
      unpack_all<bfloat16_t>(part.values, values);
    }
  }
}

}  // namespace fastattn
