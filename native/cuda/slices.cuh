/* slices.cuh: how attention reads a block: in slices of eight values, which come out as f16 pairs for the tensor cores,
 * by table rather than by arithmetic.
 *
 * A table in shared memory holds, for every pair of indices, both levels as two f16. Lane i of a warp looks up in its
 * own copy, which lies in bank i: whatever the indices, a warp's look-up takes one cycle. 3 bits: 64 pairs * 32 copies
 * * 4 bytes = 8 KiB, spread over 16 (SPACING); 4 bits: 32 KiB. So two values take a shift, an and, and one load. pqt4
 * has 32 levels; a table of pairs would need 128 KiB, so it looks up values singly, 4 KiB, and so does pqt5, 8 KiB.
 * Byte permutation on a table in registers needs indices spread to 4 bits first: about 2.5 instructions per value
 * instead of 1.5.
 *
 * A score's sum may run over a row in any order, so each of the four lanes that share a row takes the eight values that
 * are cheapest for it to find, "part" 0 to 3 of the block: q is laid out to match (dim). For V the pairs must be of two
 * tokens in one dimension, because tensor cores sum along pairs: across() merges the slices of two tokens first, so the
 * table serves again.
 *
 * Each type has:
 *   BYTES                   per block
 *   ENTRIES, SPACING        of its table, and the bytes from one to the next (layout.h)
 *   unit                    what a level is multiplied by in the table, so that scale * level cannot overflow f16:
 *                           65504 * 2.51 / 4; the results are multiplied by 1 / unit at the end
 *   slice, load             eight values of a row
 *   along, merge, across    pairs of one token, and of two
 *   ORDER, dim              which value of the block value n of a part is (tqi_dim)
 *   place, half, load_half  where a part, or two parts of one block, are, for those who load many times
 * n is a constant from 0 to 7 everywhere. */
#ifndef TQI_SLICES_CUH
#define TQI_SLICES_CUH

#include "format.cuh"
#include "layout.h"

#define TQI_LANES 32

/* ---- Values of a part ---- */

/* In which order the four parts share a block's values: eight side by side; pairs in turn; four in turn. A part's words
 * begin in other banks than those of the other parts, and of the seven rows that a warp reads beside it. */
enum { TQI_ORDER_EIGHTS, TQI_ORDER_PAIRS, TQI_ORDER_FOURS };

/* Which value of the block value n of a part is. */
TQI_HD constexpr int tqi_dim(int order, int part, int n) {
    return order == TQI_ORDER_PAIRS   ? 8 * (n / 2) + 2 * part + n % 2
           : order == TQI_ORDER_FOURS ? 16 * (n / 4) + 4 * part + n % 4
                                      : 8 * part + n;
}

/* The inverse: value i of a block is value n of a part. */
struct tqi_spot {
    int part, n;
};

TQI_HD tqi_spot tqi_spot_of(int order, int i) {
    tqi_spot s;
    s.part = order == TQI_ORDER_PAIRS ? i % 8 / 2 : order == TQI_ORDER_FOURS ? i % 16 / 4 : i / 8;
    s.n = order == TQI_ORDER_PAIRS ? 2 * (i / 8) + i % 2 : order == TQI_ORDER_FOURS ? 4 * (i / 16) + i % 4 : i % 8;
    return s;
}

TQI_HD bool tqi_is_trellis(int type) {
    return type >= TQ_TYPE_PQT3 && type <= TQ_TYPE_PQT5;
}

TQI_HD int tqi_order_of(int type) {
    return tqi_is_trellis(type) || type == TQ_TYPE_F16 ? TQI_ORDER_PAIRS
           : type == TQ_CUDA_TYPE_Q8_0                 ? TQI_ORDER_FOURS
                                                       : TQI_ORDER_EIGHTS;
}

/* ---- Types ---- */

/* Word i of the bytes from offset byte on in block b of a row in shared memory; rows begin at multiples of four. Two
 * blocks are a whole number of words, so that where a lane's bytes lie in a word depends on b's parity alone: written
 * so that the compiler sees it and computes two shifts, not one for each block. */
template <int BYTES> TQI_D uint32_t tqi_load_word(const uint32_t * row, int b, int byte, int i) {
    const int at = 8 * (byte + (b & 1 ? BYTES : 0));
    const uint32_t * from = row + BYTES / 2 * (b >> 1) + (at >> 5) + i;
    return tqi_funnel(from[0], from[1], at);
}

/* Entry (word >> shift) & (ENTRIES - 1) of this lane's copy. Shift and multiplication are one, and the lane is put in
 * by the instruction that masks. */
template <int ENTRIES, int SPACING> TQI_D uint32_t tqi_look_up(const uint32_t * table, uint32_t word, int shift) {
    const int up = SPACING == 256 ? 8 : 7;
    const uint32_t lane = 4u * ((uint32_t) tqi_thread() % TQI_LANES), mask = (uint32_t) (ENTRIES - 1) * SPACING;
    const uint32_t at = ((shift >= up ? word >> (shift - up) : word << (up - shift)) & mask) | lane;
    return *(const uint32_t *) (const void *) ((const uint8_t *) table + at);
}

TQI_D uint16_t tqi_load_half(const uint32_t * row, int byte) {
    return ((const uint16_t *) (const void *) row)[byte >> 1];
}

/* Types whose slice is one word of eight indices of BITS bits. */
template <int NUMBER, int BITS, int IN_ORDER> struct tqi_packed {
    static const int TYPE = NUMBER;
    static const int SCALED = 1;
    static const int ORDER = IN_ORDER;
    static const int ENTRIES = tqi_table_of(TYPE).entries;
    static const int SPACING = tqi_table_of(TYPE).spacing;
    static_assert(ENTRIES == 1 << (2 * BITS), "the table holds pairs");
    /* 24 bits leave room to begin at bit 8, which spares a slice's first look-up its shift if entries are 256 bytes
     * apart. */
    static const int UP = SPACING == 256 ? 8 : 0;
    static_assert(UP == 0 || BITS == 3, "four bits leave no room");
    static const uint32_t EVEN = (BITS == 3 ? 0x1c71c7u : 0x0f0f0f0fu) << UP; /* indices 0, 2, 4, 6 */
    typedef uint32_t slice;
    struct merged {
        uint32_t even, odd; /* index n of two tokens side by side */
    };

    static TQI_HD float unit() { return 0.25f; }

    static TQI_D uint32_t entry(const float * levels, int i) {
        const int mask = (1 << BITS) - 1;
        return tqi_half2(levels[i & mask] * unit(), levels[i >> BITS] * unit());
    }

    /* values n, n + 1 of a slice; n even */
    static TQI_D uint32_t along(const uint32_t * table, const slice & s, int n) {
        return tqi_look_up<ENTRIES, SPACING>(table, s, UP + BITS * n);
    }

    /* Bits beyond the eight indices are whatever they are: look_up takes none of them. */
    static TQI_D merged merge(const slice & a, const slice & b) {
        merged m;
        m.even = tqi_select(EVEN, a, b << BITS);
        m.odd = tqi_select(EVEN, a >> BITS, b);
        return m;
    }

    /* value n of two slices */
    static TQI_D uint32_t across(const uint32_t * table, const merged & m, int n) {
        return tqi_look_up<ENTRIES, SPACING>(table, n & 1 ? m.odd : m.even, UP + BITS * (n & ~1));
    }
};

struct tqi_pqo3 : tqi_packed<TQ_TYPE_PQO3, 3, TQI_ORDER_EIGHTS> {
    static const int BYTES = TQI_PQO3_BYTES;
    struct place {
        int word[2], shift[2]; /* in a block that begins a word, and in one that begins in the middle of one */
    };
    struct half {
        int word, selector[2];
    };

    static TQI_D place place_of(int part) {
        place l;
        TQI_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int at = 8 * (i * BYTES + 2 + 3 * part) - UP;
            l.word[i] = tqi_keep(at >> 5);
            l.shift[i] = tqi_keep(at & 31);
        }
        return l;
    }

    static TQI_D uint32_t load(const uint32_t * row, int b, const place & l) {
        const uint32_t * from = row + BYTES / 2 * (b >> 1) + (b & 1 ? l.word[1] : l.word[0]);
        return tqi_funnel(from[0], from[1], b & 1 ? l.shift[1] : l.shift[0]);
    }

    /* Six bytes from an even offset on, which lie in two words. */
    static TQI_D half half_of(int b, int i) {
        const int at = BYTES * b + 2 + 6 * i;
        half l;
        l.word = tqi_keep(at / 4);
        l.selector[0] = tqi_keep(at % 4 == 0 ? 0x2100 : 0x4320);
        l.selector[1] = tqi_keep(at % 4 == 0 ? 0x5430 : 0x7650);
        return l;
    }

    static TQI_D void load_half(const uint32_t * row, const half & l, uint32_t * s) {
        const uint32_t * from = row + l.word;
        s[0] = tqi_permute(from[0], from[1], (uint32_t) l.selector[0]);
        s[1] = tqi_permute(from[0], from[1], (uint32_t) l.selector[1]);
    }
};

/* Of types whose parts need no more than their number to be found. */
template <typename T, typename SLICE> struct tqi_plain_places {
    typedef int place;
    struct half {
        int b, i;
    };

    static TQI_D place place_of(int part) { return part; }
    static TQI_D half half_of(int b, int i) { return { b, i }; }

    static TQI_D void load_half(const uint32_t * row, const half & l, SLICE * s) {
        s[0] = T::load(row, l.b, 2 * l.i);
        s[1] = T::load(row, l.b, 2 * l.i + 1);
    }
};

struct tqi_pqo4 : tqi_packed<TQ_TYPE_PQO4, 4, TQI_ORDER_EIGHTS>, tqi_plain_places<tqi_pqo4, uint32_t> {
    static const int BYTES = TQI_PQO4_BYTES;
    static TQI_D uint32_t load(const uint32_t * row, int b, int part) {
        return tqi_load_word<BYTES>(row, b, 2 + 4 * part, 0);
    }
};

/* The subsets of 32 values: of each pair of values both bits of the even one's, and of the odd one's, where the pair
 * has its bits in the word. So a part's are found by one shift, whatever the part. */
TQI_D void tqi_trellis_subsets(uint32_t t, uint32_t * of_even, uint32_t * of_odd) {
    const uint32_t low = tqi_subset_low(t), high = tqi_subset_high(t);
    *of_even = tqi_select(0x55555555u, low, high << 1);
    *of_odd = tqi_select(0x55555555u, low >> 1, high);
}

/* A trellis block's words, shifted so that values 2 part and 2 part + 1 of each byte are bits 0 and 1: the block's
 * words were laid out for that (format.h). Levels of the even ones and of the odd ones, four bytes each. */
template <int BITS>
TQI_D void tqi_trellis_slice(const uint32_t * row, int b, int part, uint32_t * even, uint32_t * odd) {
    uint32_t words[TQI_MAX_WORDS] = { 0 };
    TQI_UNROLL
    for (int j = 0; j < BITS; ++j) {
        words[j] = tqi_load_word<4 * BITS + 2>(row, b, 2, j);
    }
    uint32_t of_even, of_odd;
    tqi_trellis_subsets(words[0], &of_even, &of_odd);
    *even = of_even >> (2 * part) & 0x03030303u;
    *odd = of_odd >> (2 * part) & 0x03030303u;
    if (BITS > 2) {
        *even |= words[1] >> (2 * part) << 2 & 0x0c0c0c0cu;
        *odd |= words[2] >> (2 * part) << 2 & 0x0c0c0c0cu;
    }
    TQI_UNROLL
    for (int j = BITS == 2 ? 1 : 3; j < BITS; ++j) { /* words with a single bit of e, which becomes bit `to` */
        const int to = BITS == 2 ? 2 : j + 1;
        const uint32_t single = words[j] >> (2 * part);
        *even |= single << to & 0x01010101u << to;
        *odd |= single << (to - 1) & 0x01010101u << to;
    }
}

/* 16 levels, or 8: from here on like pqo4. */
template <typename T, int NUMBER, int BITS>
struct tqi_trellis_pairs : tqi_packed<NUMBER, 4, TQI_ORDER_PAIRS>, tqi_plain_places<T, uint32_t> {
    static const int BYTES = (int) TQI_BLOCK_BYTES(BITS);
    static TQI_D uint32_t load(const uint32_t * row, int b, int part) {
        if constexpr (BITS == 3) {
            return load_3(row, b, part);
        }
        uint32_t even, odd;
        tqi_trellis_slice<BITS>(row, b, part, &even, &odd);
        return even | odd << 4;
    }

    /* Each of the four words is turned to where its two bits belong: a shift or none, and three instructions merge
     * them. */
    static TQI_D uint32_t load_3(const uint32_t * row, int b, int part) {
        uint32_t words[3], of_even, of_odd;
        TQI_UNROLL
        for (int j = 0; j < 3; ++j) {
            words[j] = tqi_load_word<4 * BITS + 2>(row, b, 2, j);
        }
        tqi_trellis_subsets(words[0], &of_even, &of_odd);
        const uint32_t even = tqi_select(0x03030303u, turn(of_even, 2 * part), turn(words[1], 2 * part - 2));
        const uint32_t odd = tqi_select(0x30303030u, turn(of_odd, 2 * part - 4), turn(words[2], 2 * part - 6));
        return tqi_select(0x0f0f0f0fu, even, odd);
    }

    /* To the right by n, or to the left by -n; who wraps around is not looked at. */
    static TQI_D uint32_t turn(uint32_t x, int n) { return tqi_funnel(x, x, n & 31); }
};

struct tqi_pqt2 : tqi_trellis_pairs<tqi_pqt2, TQ_TYPE_PQT2, 2> {};
struct tqi_pqt3 : tqi_trellis_pairs<tqi_pqt3, TQ_TYPE_PQT3, 3> {};

/* Of types that look up each value of two tokens for itself. */
template <typename SLICE> struct tqi_two_slices {
    typedef SLICE slice;
    struct merged {
        slice a, b;
    };

    static TQI_D merged merge(const slice & a, const slice & b) { return { a, b }; }
};

struct tqi_trellis_bytes {
    uint32_t even, odd;
};

/* 32 or 64 levels: a byte for each value. */
template <typename T, int NUMBER, int BITS>
struct tqi_trellis_singles : tqi_two_slices<tqi_trellis_bytes>, tqi_plain_places<T, tqi_trellis_bytes> {
    static const int TYPE = NUMBER;
    static const int BYTES = (int) TQI_BLOCK_BYTES(BITS);
    static const int SCALED = 1;
    static const int ORDER = TQI_ORDER_PAIRS;
    static const int ENTRIES = tqi_table_of(TYPE).entries;
    static const int SPACING = tqi_table_of(TYPE).spacing;

    static TQI_HD float unit() { return 0.25f; }
    static TQI_D uint32_t entry(const float * levels, int i) {
        return tqi_half2(levels[i] * unit(), levels[i] * unit());
    }

    static TQI_D tqi_trellis_bytes load(const uint32_t * row, int b, int part) {
        tqi_trellis_bytes s;
        tqi_trellis_slice<BITS>(row, b, part, &s.even, &s.odd);
        return s;
    }

    static TQI_D uint32_t look_up(const uint32_t * table, const tqi_trellis_bytes & s, int n) {
        return tqi_look_up<ENTRIES, SPACING>(table, n & 1 ? s.odd : s.even, 8 * (n / 2));
    }

    static TQI_D uint32_t along(const uint32_t * table, const tqi_trellis_bytes & s, int n) {
        return tqi_permute(look_up(table, s, n), look_up(table, s, n + 1), 0x7610);
    }

    static TQI_D uint32_t across(const uint32_t * table, const typename tqi_two_slices<tqi_trellis_bytes>::merged & m,
                                 int n) {
        return tqi_permute(look_up(table, m.a, n), look_up(table, m.b, n), 0x7610);
    }
};

struct tqi_pqt4 : tqi_trellis_singles<tqi_pqt4, TQ_TYPE_PQT4, 4> {};
struct tqi_pqt5 : tqi_trellis_singles<tqi_pqt5, TQ_TYPE_PQT5, 5> {};

/* ---- Stock types, on the one side of a mixed pair ---- */

/* Of types whose bytes are the levels themselves. */
struct tqi_no_table {
    static const int ENTRIES = 0;
    static const int SPACING = 0;

    static TQI_HD float unit() { return 1.0f; }
    static TQI_D uint32_t entry(const float *, int) { return 0; }
};

/* f16 as it is: its "block" is 32 values. Words 4 i + part. */
struct tqi_f16_slice {
    uint32_t pair[4];
};

struct tqi_f16 : tqi_no_table, tqi_two_slices<tqi_f16_slice>, tqi_plain_places<tqi_f16, tqi_f16_slice> {
    static const int TYPE = TQ_TYPE_F16;
    static const int BYTES = 2 * TQ_BLOCK;
    static const int SCALED = 0;
    static const int ORDER = TQI_ORDER_PAIRS;

    static TQI_D slice load(const uint32_t * row, int b, int part) {
        slice s;
        TQI_UNROLL
        for (int i = 0; i < 4; ++i) {
            s.pair[i] = row[BYTES / 4 * b + 4 * i + part];
        }
        return s;
    }

    static TQI_D uint32_t along(const uint32_t *, const slice & s, int n) { return s.pair[n / 2]; }

    static TQI_D uint32_t across(const uint32_t *, const merged & m, int n) {
        return tqi_permute(m.a.pair[n / 2], m.b.pair[n / 2], n & 1 ? 0x7632 : 0x5410);
    }
};

/* q8_0: words part and part + 4 of a block's 32 bytes. Byte x, its sign bit turned, is the low byte of the f16 1024 +
 * 128 + x, whatever the sign: 1152 less is x, exactly. */
struct tqi_q8_0_slice {
    uint32_t word[2];
};

struct tqi_q8_0 : tqi_no_table, tqi_two_slices<tqi_q8_0_slice>, tqi_plain_places<tqi_q8_0, tqi_q8_0_slice> {
    static const int TYPE = TQ_CUDA_TYPE_Q8_0;
    static const int BYTES = TQI_Q8_0_BYTES;
    static const int SCALED = 1;
    static const int ORDER = TQI_ORDER_FOURS;

    static TQI_D slice load(const uint32_t * row, int b, int part) {
        slice s;
        TQI_UNROLL
        for (int i = 0; i < 2; ++i) {
            s.word[i] = tqi_load_word<BYTES>(row, b, 2 + 4 * part + 16 * i, 0);
        }
        return s;
    }

    static TQI_D uint32_t less_1152(uint32_t pair) { return tqi_add_half2(pair, 0xe480e480u); }

    static TQI_D uint32_t along(const uint32_t *, const slice & s, int n) {
        return less_1152(tqi_permute(s.word[n / 4] ^ 0x80808080u, 0x64646464u, n % 4 == 0 ? 0x4140 : 0x4342));
    }

    static TQI_D uint32_t across(const uint32_t *, const merged & m, int n) {
        const uint32_t pair =
            tqi_permute(m.a.word[n / 4], m.b.word[n / 4], (uint32_t) (n % 4 | (n % 4 + 4) << 8)); /* bytes 0 and 2 */
        return less_1152((pair & 0x00ff00ffu) ^ 0x64806480u);
    }
};

/* Calls with an object of the type that the number means. */
template <typename F> TQI_D void tqi_with_type(int type, const F & call) {
    switch (type) {
        case TQ_TYPE_PQO3:
            return call(tqi_pqo3());
        case TQ_TYPE_PQO4:
            return call(tqi_pqo4());
        case TQ_TYPE_PQT2:
            return call(tqi_pqt2());
        case TQ_TYPE_PQT3:
            return call(tqi_pqt3());
        case TQ_TYPE_PQT4:
            return call(tqi_pqt4());
        case TQ_TYPE_PQT5:
            return call(tqi_pqt5());
        case TQ_CUDA_TYPE_Q8_0:
            return call(tqi_q8_0());
        default:
            return call(tqi_f16());
    }
}

/* The scales of two rows' block that begins at byte at, f16 side by side; 1 for f16. Times any level they are finite
 * whatever the block has, for a weight of 0 must cancel them: at most 65504, or 511 where levels reach 128. */
template <typename T> TQI_D uint32_t tqi_scales(const uint32_t * row0, const uint32_t * row1, int at) {
    constexpr uint32_t most = T::TYPE == TQ_CUDA_TYPE_Q8_0 ? 0x5ffc5ffcu : 0x7bff7bffu;
    return T::SCALED ? tqi_bounded_halves(tqi_load_half(row0, at) | (uint32_t) tqi_load_half(row1, at) << 16, most)
                     : 0x3c003c00u;
}

#endif
