/* attention_types.cu: kernels by warps for K and V of one type. */
#include "attention_kernels.cuh"

tqi_attention_kernel tqi_kernel_of_one_type(const tqi_attention & p) {
    tqi_attention_kernel kernel = NULL;
    tqi_offer_kernel<tqi_pqo3, tqi_pqo3>(p, &kernel);
    tqi_offer_kernel<tqi_pqo4, tqi_pqo4>(p, &kernel);
    tqi_offer_kernel<tqi_pqt2, tqi_pqt2>(p, &kernel);
    tqi_offer_kernel<tqi_pqt3, tqi_pqt3>(p, &kernel);
    tqi_offer_kernel<tqi_pqt4, tqi_pqt4>(p, &kernel);
    tqi_offer_kernel<tqi_pqt5, tqi_pqt5>(p, &kernel);
    return kernel;
}
