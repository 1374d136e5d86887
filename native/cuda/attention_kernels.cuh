/* attention_kernels.cuh: the kernels by warps: for which pairs of types there are some, and how one is found. Their
 * code is in several files, for they are many: attention_types.cu has those of one type, attention_pairs.cu of tqgguf's
 * types in pairs, attention_q8_0.cu and attention_f16.cu those with a stock type on one side. */
#ifndef TQI_ATTENTION_KERNELS_CUH
#define TQI_ATTENTION_KERNELS_CUH

#include "attention_warp.cuh"

typedef void (*tqi_attention_kernel)(const tqi_attention p);

/* For K and V of one pair of types, DK = DV = 32 BLOCKS: 64, 128, 256 or 512, and 8 NT query vectors. On sm_75 heads of
 * 256 and more are never launched, as their stages do not fit its 64 KiB (tqi_cuda_plan): no code for them. */
template <typename K, typename V, int NT, int BLOCKS>
TQI_KERNEL(TQI_ATTENTION_THREADS, TQI_ATTENTION_BLOCKS)
tqi_attend_warp_kernel(TQI_PARAMETER tqi_attention p) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
    constexpr bool launched = BLOCKS < 8;
#else
    constexpr bool launched = true;
#endif
    if constexpr (launched) {
        TQI_SHARED(shared);
        tqi_attend_by_warps<tqi_warp_shape<K, V, NT, BLOCKS>>(p, shared);
    }
}

template <typename K, typename V, int NT> static tqi_attention_kernel tqi_warp_kernel_of_size(int blocks) {
    switch (blocks) {
        case 2:
            return tqi_attend_warp_kernel<K, V, NT, 2>;
        case 4:
            return tqi_attend_warp_kernel<K, V, NT, 4>;
        case 8:
            return tqi_attend_warp_kernel<K, V, NT, 8>;
        default:
            return tqi_attend_warp_kernel<K, V, NT, 16>;
    }
}

/* Sets *kernel if a call's types are K's and V's. */
template <typename K, typename V> static void tqi_offer_kernel(const tqi_attention & p, tqi_attention_kernel * kernel) {
    if (p.k.type == K::TYPE && p.v.type == V::TYPE) {
        *kernel =
            p.n_tiles == 1 ? tqi_warp_kernel_of_size<K, V, 1>(p.blocks) : tqi_warp_kernel_of_size<K, V, 2>(p.blocks);
    }
}

/* The same for X on either side of each of tqgguf's types. */
template <typename X> static tqi_attention_kernel tqi_kernel_beside(const tqi_attention & p) {
    tqi_attention_kernel kernel = NULL;
    tqi_offer_kernel<X, tqi_pqo3>(p, &kernel);
    tqi_offer_kernel<X, tqi_pqo4>(p, &kernel);
    tqi_offer_kernel<X, tqi_pqt2>(p, &kernel);
    tqi_offer_kernel<X, tqi_pqt3>(p, &kernel);
    tqi_offer_kernel<X, tqi_pqt4>(p, &kernel);
    tqi_offer_kernel<X, tqi_pqt5>(p, &kernel);
    tqi_offer_kernel<tqi_pqo3, X>(p, &kernel);
    tqi_offer_kernel<tqi_pqo4, X>(p, &kernel);
    tqi_offer_kernel<tqi_pqt2, X>(p, &kernel);
    tqi_offer_kernel<tqi_pqt3, X>(p, &kernel);
    tqi_offer_kernel<tqi_pqt4, X>(p, &kernel);
    tqi_offer_kernel<tqi_pqt5, X>(p, &kernel);
    return kernel;
}

/* The kernel of a call whose plan has blocks: tqi_has_warp_kernel says for which types there is one. */
tqi_attention_kernel tqi_kernel_of_one_type(const tqi_attention & p);
tqi_attention_kernel tqi_kernel_of_pair(const tqi_attention & p);
tqi_attention_kernel tqi_kernel_beside_q8_0(const tqi_attention & p);
tqi_attention_kernel tqi_kernel_beside_f16(const tqi_attention & p);

#endif
