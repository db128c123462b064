// libcuda.so.1 without a GPU: what Triton's driver and launchers call, and nothing else.  See jit_stand_in.py.
//
// It answers for one device, says no to a launch that such a device would refuse, and counts the others.  Pointers are
// taken as they come; nothing is run.

#include <stddef.h>

#include "cuda.h"

int stand_in_capability = 90;
int stand_in_shared = 232448;  // bytes that a block may ask for
int stand_in_registers = 0;    // of the function that is loaded next
int stand_in_stack = 0;        // bytes of local memory of a thread
long stand_in_launches = 0;

static int kContext, kModule, kFunction;
static int max_threads(void) {
  int registers = (stand_in_registers + 7) / 8 * 8;
  int threads = registers == 0 ? 1024 : 65536 / registers / 32 * 32;
  return threads < 1024 ? threads : 1024;
}

CUresult cuInit(unsigned int flags) { return CUDA_SUCCESS; }
CUresult cuDriverGetVersion(int* version) { return *version = 13000, CUDA_SUCCESS; }
CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = error == CUDA_SUCCESS ? "no error" : "refused by the stand-in for libcuda", CUDA_SUCCESS;
}
CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
CUresult cuCtxGetCurrent(CUcontext* context) { return *context = (CUcontext)&kContext, CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuCtxGetDevice(CUdevice* device) { return *device = 0, CUDA_SUCCESS; }
CUresult cuCtxGetLimit(size_t* value, CUlimit limit) { return *value = 1 << 20, CUDA_SUCCESS; }
CUresult cuCtxSetLimit(CUlimit limit, size_t value) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = (CUcontext)&kContext, CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice device) {
  switch (attribute) {
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR: return *value = stand_in_capability / 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR: return *value = stand_in_capability % 10, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN: return *value = stand_in_shared, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR: return *value = stand_in_shared + 1024, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK: return *value = 65536, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT: return *value = 132, CUDA_SUCCESS;
    case CU_DEVICE_ATTRIBUTE_WARP_SIZE: return *value = 32, CUDA_SUCCESS;
    default: return *value = 1, CUDA_SUCCESS;
  }
}

CUresult cuModuleLoadData(CUmodule* module, const void* image) { return *module = (CUmodule)&kModule, CUDA_SUCCESS; }
CUresult cuModuleUnload(CUmodule module) { return CUDA_SUCCESS; }
CUresult cuModuleGetFunction(CUfunction* function, CUmodule module, const char* name) {
  return *function = (CUfunction)&kFunction, CUDA_SUCCESS;
}
CUresult cuFuncGetAttribute(int* value, CUfunction_attribute attribute, CUfunction function) {
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_NUM_REGS: return *value = stand_in_registers, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: return *value = stand_in_stack, CUDA_SUCCESS;
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: return *value = max_threads(), CUDA_SUCCESS;
    default: return *value = 0, CUDA_SUCCESS;
  }
}
CUresult cuFuncSetAttribute(CUfunction function, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
CUresult cuFuncSetCacheConfig(CUfunction function, CUfunc_cache config) { return CUDA_SUCCESS; }
CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return *status = CU_STREAM_CAPTURE_STATUS_NONE, CUDA_SUCCESS;
}
CUresult cuPointerGetAttribute(void* data, CUpointer_attribute attribute, CUdeviceptr pointer) {
  return *(CUdeviceptr*)data = pointer, CUDA_SUCCESS;
}

CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void** arguments, void** extra) {
  unsigned long threads = (unsigned long)config->blockDimX * config->blockDimY * config->blockDimZ;
  if (function != (CUfunction)&kFunction || arguments == NULL || threads == 0 || threads > 1024 ||
      config->gridDimX - 1 >= 0x7fffffffU || config->gridDimY - 1 >= 65535U || config->gridDimZ - 1 >= 65535U ||
      config->sharedMemBytes > (unsigned)stand_in_shared) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  ++stand_in_launches;
  return CUDA_SUCCESS;
}
