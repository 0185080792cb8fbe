// Leads a search for cuBLASLt by its name to the library that FAKE_CUBLASLT names.
//
// A torch built for CUDA loads the real one when it is imported, and it has the same name.
#include <dlfcn.h>

#include <cstdlib>
#include <cstring>

extern "C" void* dlopen(const char* name, int mode) {
  static const auto real = reinterpret_cast<decltype(&dlopen)>(dlsym(RTLD_NEXT, "dlopen"));
  const bool wanted = name != nullptr && std::strncmp(name, "libcublasLt.so.", 15) == 0;
  return real(wanted ? std::getenv("FAKE_CUBLASLT") : name, mode);
}
