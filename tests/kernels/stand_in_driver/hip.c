// libamdhip64.so without a GPU: what Triton's driver and launchers call, and nothing else.  See cuda.c beside this file.

#define __HIP_PLATFORM_AMD__
#include <hip/hip_runtime.h>
#include <hip/hip_runtime_api.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

int stand_in_shared = 65536;
long stand_in_launches = 0;

static int kModule, kFunction;

hipError_t hipDriverGetVersion(int* version) { return *version = 60443484, hipSuccess; }
const char* hipGetErrorString(hipError_t error) { return error == hipSuccess ? "no error" : "refused by the stand-in"; }
hipError_t hipGetLastError(void) { return hipSuccess; }

hipError_t hipGetDeviceProperties(hipDeviceProp_t* properties, int device) {
  memset(properties, 0, sizeof(*properties));
  properties->sharedMemPerBlock = stand_in_shared;
  properties->regsPerBlock = 65536;
  properties->multiProcessorCount = 304;
  properties->warpSize = 64;
  properties->maxThreadsPerMultiProcessor = 2048;
  strcpy(properties->gcnArchName, "gfx942:sramecc+:xnack-");
  return hipSuccess;
}

hipError_t hipModuleLoadDataEx(hipModule_t* module, const void* image, unsigned int count, hipJitOption* options,
                               void** values) {
  return *module = (hipModule_t)&kModule, hipSuccess;
}
hipError_t hipModuleUnload(hipModule_t module) { return hipSuccess; }
hipError_t hipModuleGetFunction(hipFunction_t* function, hipModule_t module, const char* name) {
  return *function = (hipFunction_t)&kFunction, hipSuccess;
}
hipError_t hipFuncGetAttribute(int* value, hipFunction_attribute attribute, hipFunction_t function) {
  return *value = attribute == HIP_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, hipSuccess;
}
hipError_t hipPointerGetAttribute(void* data, hipPointer_attribute attribute, hipDeviceptr_t pointer) {
  return *(hipDeviceptr_t*)data = pointer, hipSuccess;
}

hipError_t hipModuleLaunchKernel(hipFunction_t function, unsigned int grid_x, unsigned int grid_y, unsigned int grid_z,
                                 unsigned int block_x, unsigned int block_y, unsigned int block_z,
                                 unsigned int shared, hipStream_t stream, void** arguments, void** extra) {
  // HIP counts threads of a grid, not blocks, in 32 bits.
  uint64_t threads = (uint64_t)block_x * block_y * block_z;
  if (function != (hipFunction_t)&kFunction || arguments == NULL || threads == 0 || threads > 1024 ||
      (uint64_t)grid_x * block_x > UINT32_MAX || grid_x == 0 || shared > (unsigned)stand_in_shared) {
    return hipErrorInvalidValue;
  }
  ++stand_in_launches;
  return hipSuccess;
}

static hipError_t refused(void) { return hipErrorInvalidValue; }

// Triton asks for functions by name; the header renames some to a newer version's.
hipError_t hipGetProcAddress(const char* name, void** found, int version, uint64_t flags,
                             hipDriverProcAddressQueryResult* status) {
  static const struct {
    const char* name;
    void* function;
  } kFunctions[] = {
      {"hipGetErrorString", hipGetErrorString},
      {"hipGetLastError", hipGetLastError},
      {"hipGetDeviceProperties", hipGetDeviceProperties},
      {"hipModuleLoadDataEx", hipModuleLoadDataEx},
      {"hipModuleUnload", hipModuleUnload},
      {"hipModuleGetFunction", hipModuleGetFunction},
      {"hipFuncGetAttribute", hipFuncGetAttribute},
      {"hipPointerGetAttribute", hipPointerGetAttribute},
      {"hipModuleLaunchKernel", hipModuleLaunchKernel},
      {"hipModuleLaunchCooperativeKernel", refused},
      {"hipDrvLaunchKernelEx", refused},
  };
  for (size_t i = 0; i < sizeof(kFunctions) / sizeof(kFunctions[0]); ++i) {
    if (strcmp(name, kFunctions[i].name) == 0) {
      *found = kFunctions[i].function;
      return hipSuccess;
    }
  }
  return hipErrorInvalidValue;
}
