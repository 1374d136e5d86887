/* attention_pairs.cu: kernels by warps for the pairs of tqgguf's types that people choose: pqo4 with pqo3, and the
 * presets best, balanced and tiny. */
#include "attention_kernels.cuh"

tqi_attention_kernel tqi_kernel_of_pair(const tqi_attention & p) {
    tqi_attention_kernel kernel = NULL;
    tqi_offer_kernel<tqi_pqo4, tqi_pqo3>(p, &kernel);
    tqi_offer_kernel<tqi_pqt5, tqi_pqt4>(p, &kernel);
    tqi_offer_kernel<tqi_pqt4, tqi_pqt3>(p, &kernel);
    tqi_offer_kernel<tqi_pqt3, tqi_pqt2>(p, &kernel);
    return kernel;
}
