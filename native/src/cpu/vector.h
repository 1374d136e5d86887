/* vector.h: what all instruction sets share of the vocabulary that vector_avx2.h, vector_avx512.h and vector_neon.h
 * define. The steps in block.h, scale_search.h, trellis_search.h, fused.h, softmax.h, gemm.h and rows_f16.h are written
 * over it.
 *
 *   LANES                      how many values a vector has
 *   SUMS                       how many vectors of sums a loop can keep in registers
 *   vec, words, truth          LANES floats, 32-bit integers, truth values
 *   v_set1(x)                  x in all lanes
 *   v_load(p), v_store(p, a)   floats at any address; v_load_all(p): *p in all lanes
 *   v_load_f16, v_store_f16    the same for f16 in memory; storing rounds to the nearest, ties to even
 *   v_add, _sub, _mul, _div    lane by lane, rounded as in scalar code
 *   v_min(a, b), v_max(a, b)   b where a lane is NaN on x86, NaN on AArch64
 *   v_abs(a)                   the magnitude
 *   v_fma(a, b, c)             a * b + c, rounded once
 *   v_round(a)                 to the nearest integer
 *   v_scale(keep, a, n)        a * 2^n where keep is true, else 0; n holds integers
 *   v_sum(a)                   sum in a halving tree, as tqi_sum32; v_highest(a): the largest value
 *   v_hadamard(a)              butterflies at distances 1, 2, ... LANES / 2: of each pair the sum, then the difference;
 *                              on x86 one FMA for both, which rounds alike because a product with 1 or -1 is exact
 *   v_lookup(table, index)     values of a table of eight floats; v_lookup16: of sixteen
 *   v_per_block(p, stride)     lane j holds p[j / 8 * stride]
 *   v_less, v_not_less, v_equal(a, b)  truth values; with NaN only v_not_less is true
 *   v_select(which, yes, no)   yes where which is true, else no
 *   v_keep(which, a)           a where which is true, else 0
 *   v_lane(&which, j)          truth value j
 *   w_zero(), w_add(a, b), w_store(p, a)
 *   w_bits(w)                  lane j holds bit j of the integer w
 *   w_count(n, which)          n + 1 where which is true, else n
 *   f16_to_f32, f32_to_f16     one value */
#ifndef TQI_VECTOR_H
#define TQI_VECTOR_H

#include "kernels.h"

#define INLINE static inline __attribute__((always_inline))

/* Where a loop's counter must be a constant, so that arrays of vectors become registers, and GCC does not see that it
 * pays. */
#define UNROLL _Pragma("GCC unroll 16")

#endif
