// What `crates/fabric/src/nccl/ffi.rs` takes for granted of NCCL and of CUDA's driver, against
// their headers, at compile time. The headers are in the wheels `nvidia-nccl-cu12` and
// `nvidia-cuda-runtime-cu12`; `stubs` has what the first includes of CUDA.
//
//     cc -fsyntax-only -Itools/nccl/stubs -IWHEELS/nvidia/nccl/include
//        -idirafter WHEELS/nvidia/cuda_runtime/include tools/nccl/layout.c

#include <stddef.h>
#include <cuda.h>
#include <nccl.h>

#define IS(what) _Static_assert(what, #what)

// The configuration as 2.14 had it is the beginning of the present one. In place of its last four
// bytes, which were padding, is a field that an undefined value leaves to the library.
static const ncclConfig_t initial = NCCL_CONFIG_INITIALIZER;
IS(offsetof(ncclConfig_t, size) == 0 && sizeof initial.size == 8);
IS(offsetof(ncclConfig_t, magic) == 8 && sizeof initial.magic == 4);
IS(offsetof(ncclConfig_t, version) == 12 && sizeof initial.version == 4);
IS(offsetof(ncclConfig_t, blocking) == 16 && sizeof initial.blocking == 4);
IS(offsetof(ncclConfig_t, cgaClusterSize) == 20 && sizeof initial.cgaClusterSize == 4);
IS(sizeof(ncclConfig_t) >= 24);
IS(NCCL_CONFIG_UNDEF_INT == -2147483647 - 1);
IS(NCCL_VERSION(2, 14, 0) == 21400 && NCCL_VERSION_CODE >= 21400);
IS(sizeof(ncclUniqueId) == 128 && NCCL_UNIQUE_ID_BYTES == 128);
#ifdef NCCL_API_MAGIC
IS(NCCL_API_MAGIC == 0xcafebeef);
#endif

IS(ncclSuccess == 0 && ncclSystemError == 2 && ncclRemoteError == 6 && ncclInProgress == 7);
IS(ncclUint8 == 1 && ncclInt32 == 2 && ncclFloat16 == 6 && ncclFloat32 == 7 && ncclBfloat16 == 9);
IS(ncclSum == 0);
IS(sizeof(ncclResult_t) == 4 && sizeof(ncclDataType_t) == 4 && sizeof(ncclRedOp_t) == 4);

// The functions, with the types that the header gives them.
typedef ncclResult_t on_comm(ncclComm_t);
typedef ncclResult_t on_group(void);
ncclResult_t (*const get_version)(int *) = ncclGetVersion;
ncclResult_t (*const get_unique_id)(ncclUniqueId *) = ncclGetUniqueId;
ncclResult_t (*const init_rank)(ncclComm_t *, int, ncclUniqueId, int, ncclConfig_t *) =
    ncclCommInitRankConfig;
on_comm *const finalize = ncclCommFinalize, *const destroy = ncclCommDestroy,
               *const end = ncclCommAbort;
ncclResult_t (*const async_error)(ncclComm_t, ncclResult_t *) = ncclCommGetAsyncError;
const char *(*const error_string)(ncclResult_t) = ncclGetErrorString;
const char *(*const last_error)(ncclComm_t) = ncclGetLastError;
on_group *const group_start = ncclGroupStart, *const group_end = ncclGroupEnd;
ncclResult_t (*const all_reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t,
                                 ncclComm_t, cudaStream_t) = ncclAllReduce;
ncclResult_t (*const reduce)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t, int,
                             ncclComm_t, cudaStream_t) = ncclReduce;
ncclResult_t (*const reduce_scatter)(const void *, void *, size_t, ncclDataType_t, ncclRedOp_t,
                                     ncclComm_t, cudaStream_t) = ncclReduceScatter;
ncclResult_t (*const all_gather)(const void *, void *, size_t, ncclDataType_t, ncclComm_t,
                                 cudaStream_t) = ncclAllGather;
ncclResult_t (*const broadcast)(const void *, void *, size_t, ncclDataType_t, int, ncclComm_t,
                                cudaStream_t) = ncclBroadcast;
ncclResult_t (*const send)(const void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) =
    ncclSend;
ncclResult_t (*const receive)(void *, size_t, ncclDataType_t, int, ncclComm_t, cudaStream_t) =
    ncclRecv;

// The driver. Some names stand for a later version of the function, as they do in `ffi.rs`.
IS(CUDA_SUCCESS == 0 && CUDA_ERROR_NOT_READY == 600 && CU_MEMORYTYPE_UNIFIED == 4);
IS(sizeof(CUresult) == 4 && sizeof(CUdeviceptr) == 8 && sizeof(CUdevice) == 4);
IS(sizeof(CUDA_MEMCPY2D) == 128);
IS(offsetof(CUDA_MEMCPY2D, srcXInBytes) == 0 && offsetof(CUDA_MEMCPY2D, srcMemoryType) == 16);
IS(offsetof(CUDA_MEMCPY2D, srcDevice) == 32 && offsetof(CUDA_MEMCPY2D, srcPitch) == 48);
IS(offsetof(CUDA_MEMCPY2D, dstXInBytes) == 56 && offsetof(CUDA_MEMCPY2D, dstMemoryType) == 72);
IS(offsetof(CUDA_MEMCPY2D, dstDevice) == 88 && offsetof(CUDA_MEMCPY2D, dstPitch) == 104);
IS(offsetof(CUDA_MEMCPY2D, WidthInBytes) == 112 && offsetof(CUDA_MEMCPY2D, Height) == 120);
CUresult (*const init)(unsigned int) = cuInit;
CUresult (*const driver_version)(int *) = cuDriverGetVersion;
CUresult (*const get_count)(int *) = cuDeviceGetCount;
CUresult (*const get_device)(CUdevice *, int) = cuDeviceGet;
CUresult (*const get_name)(char *, int, CUdevice) = cuDeviceGetName;
CUresult (*const driver_error)(CUresult, const char **) = cuGetErrorString;
CUresult (*const stream_query)(CUstream) = cuStreamQuery;
CUresult (*const event_query)(CUevent) = cuEventQuery;
CUresult (*const copy_2d)(const CUDA_MEMCPY2D *, CUstream) = cuMemcpy2DAsync;
