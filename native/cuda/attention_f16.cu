/* attention_f16.cu: kernels by warps for f16 on one side and a type of tqgguf's on the other. */
#include "attention_kernels.cuh"

tqi_attention_kernel tqi_kernel_beside_f16(const tqi_attention & p) {
    return tqi_kernel_beside<tqi_f16>(p);
}
