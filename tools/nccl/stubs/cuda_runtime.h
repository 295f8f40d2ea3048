// As much of CUDA as NCCL's header names.
#define __CUDA_BF16_TYPES_EXIST__ 1
typedef struct CUstream_st *cudaStream_t;
typedef struct CUevent_st *cudaEvent_t;
