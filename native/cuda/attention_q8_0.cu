/* attention_q8_0.cu: kernels by warps for q8_0 on one side and a type of tqgguf's on the other. */
#include "attention_kernels.cuh"

tqi_attention_kernel tqi_kernel_beside_q8_0(const tqi_attention & p) {
    return tqi_kernel_beside<tqi_q8_0>(p);
}
