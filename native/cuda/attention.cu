#include "tq_cuda.h"
extern "C" TQ_CUDA_API size_t tq_cuda_attn_work_bytes(const tq_attn *) { return 0; }
