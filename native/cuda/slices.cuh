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
 *   dim                     which value of the block value n of a part is
 *   place, half, load_half  where a part, or two parts of one block, are, for those who load many times
 * n is a constant from 0 to 7 everywhere. */
#ifndef TQI_SLICES_CUH
#define TQI_SLICES_CUH

#include "format.cuh"
#include "layout.h"

#define TQI_LANES 32

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
template <int NUMBER, int BITS> struct tqi_packed {
    static const int TYPE = NUMBER;
    static const int SCALED = 1;
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

struct tqi_pqo3 : tqi_packed<TQ_TYPE_PQO3, 3> {
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

    static TQI_D int dim(int part, int n) { return 8 * part + n; }
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

struct tqi_pqo4 : tqi_packed<TQ_TYPE_PQO4, 4>, tqi_plain_places<tqi_pqo4, uint32_t> {
    static const int BYTES = TQI_PQO4_BYTES;
    static TQI_D uint32_t load(const uint32_t * row, int b, int part) {
        return tqi_load_word<BYTES>(row, b, 2 + 4 * part, 0);
    }
    static TQI_D int dim(int part, int n) { return 8 * part + n; }
};

/* A trellis block's words, shifted so that values 2 part and 2 part + 1 of each byte are bits 0 and 1: the block's
 * words were laid out for that (format.h). Levels of the even ones and of the odd ones, four bytes each. */
template <int BITS>
TQI_D void tqi_trellis_slice(const uint32_t * row, int b, int part, uint32_t * even, uint32_t * odd) {
    uint32_t words[TQI_MAX_WORDS] = { 0 };
    TQI_UNROLL
    for (int j = 0; j < BITS; ++j) {
        words[j] = tqi_load_word<4 * BITS + 2>(row, b, 2, j);
    }
    const uint32_t low = tqi_subset_low(words[0]) >> (2 * part), high = tqi_subset_high(words[0]) >> (2 * part);
    *even = (high << 1 & 0x02020202u) | (low & 0x01010101u);
    *odd = (high & 0x02020202u) | (low >> 1 & 0x01010101u);
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
struct tqi_trellis_pairs : tqi_packed<NUMBER, 4>, tqi_plain_places<T, uint32_t> {
    static const int BYTES = (int) TQI_BLOCK_BYTES(BITS);
    static TQI_D uint32_t load(const uint32_t * row, int b, int part) {
        uint32_t even, odd;
        tqi_trellis_slice<BITS>(row, b, part, &even, &odd);
        return even | odd << 4;
    }
    static TQI_D int dim(int part, int n) { return 8 * (n / 2) + 2 * part + n % 2; }
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

    static TQI_D int dim(int part, int n) { return tqi_pqt3::dim(part, n); }
};

struct tqi_pqt4 : tqi_trellis_singles<tqi_pqt4, TQ_TYPE_PQT4, 4> {};
struct tqi_pqt5 : tqi_trellis_singles<tqi_pqt5, TQ_TYPE_PQT5, 5> {};

/* f16 as it is, for the one side of a mixed pair. Its "block" is 32 values. */
struct tqi_f16_slice {
    uint32_t pair[4];
};

struct tqi_f16 : tqi_two_slices<tqi_f16_slice>, tqi_plain_places<tqi_f16, tqi_f16_slice> {
    static const int TYPE = TQ_TYPE_F16;
    static const int BYTES = 2 * TQ_BLOCK;
    static const int SCALED = 0;
    static const int ENTRIES = 0;
    static const int SPACING = 0;

    static TQI_HD float unit() { return 1.0f; }
    static TQI_D uint32_t entry(const float *, int) { return 0; }

    static TQI_D slice load(const uint32_t * row, int b, int part) {
        slice s;
        TQI_UNROLL
        for (int i = 0; i < 4; ++i) {
            s.pair[i] = row[BYTES / 4 * b + 4 * part + i];
        }
        return s;
    }

    static TQI_D uint32_t along(const uint32_t *, const slice & s, int n) { return s.pair[n / 2]; }

    static TQI_D uint32_t across(const uint32_t *, const merged & m, int n) {
        return tqi_permute(m.a.pair[n / 2], m.b.pair[n / 2], n & 1 ? 0x7632 : 0x5410);
    }

    static TQI_D int dim(int part, int n) { return 8 * part + n; }
};

/* The inverse of dim: value i of a block is value n of a part. */
struct tqi_spot {
    int part, n;
};

TQI_HD tqi_spot tqi_spot_of(bool trellis, int i) {
    tqi_spot s;
    s.part = trellis ? i % 8 / 2 : i / 8;
    s.n = trellis ? 2 * (i / 8) + i % 2 : i % 8;
    return s;
}

TQI_HD bool tqi_is_trellis(int type) {
    return type >= TQ_TYPE_PQT3 && type <= TQ_TYPE_PQT5;
}

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
        default:
            return call(tqi_f16());
    }
}

/* The scales of two rows' block that begins at byte at, f16 side by side; 1 for f16. They are finite whatever the block
 * has: a weight of 0 must cancel them. */
template <typename T> TQI_D uint32_t tqi_scales(const uint32_t * row0, const uint32_t * row1, int at) {
    return T::SCALED ? tqi_finite_halves(tqi_load_half(row0, at) | (uint32_t) tqi_load_half(row1, at) << 16)
                     : 0x3c003c00u;
}

#endif
