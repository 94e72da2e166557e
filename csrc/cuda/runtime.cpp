// What the CUDA runtime says about itself.
#include <cuda_runtime_api.h>

#include "../twa.h"

namespace twa {

const char* cuda_error_name(int error) { return cudaGetErrorName(static_cast<cudaError_t>(error)); }
const char* cuda_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

CudaVariant& cuda_variant() {
  static CudaVariant variant;
  return variant;
}

int cuda_device_count() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

}  // namespace twa
