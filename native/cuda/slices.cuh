/* slices.cuh: how the attention kernel reads a block: in slices of eight values, which come out as f16 pairs for the tensor
 * cores, by table rather than by arithmetic.
 *
 * A table in shared memory holds, for every pair of indices, both levels as two f16. Lane i of a warp looks up in its own
 * copy, which lies in bank i: whatever the indices, a warp's look-up takes one cycle. 3 bits: 64 pairs * 32 copies * 4 bytes
 * = 8 KiB, spread over 16 (SPACING); 4 bits: 32 KiB. So two values take a shift, an and, and one load. pqt4 has 32 levels; a table of pairs would need
 * 128 KiB, so it looks up values singly, 4 KiB. Byte permutation on a table in registers needs indices spread to 4 bits
 * first: about 2.5 instructions per value instead of 1.5.
 *
 * A score's sum may run over a row in any order, so each of the four lanes that share a row takes the eight values that are
 * cheapest for it to find, "part" 0 to 3 of the block: q is laid out to match (dim). For V the pairs must be of two tokens in
 * one dimension, tensor cores sum along pairs: across() merges the slices of two tokens first, so the table serves again.
 *
 * Each type: BYTES per block; ENTRIES of its table, SPACING bytes apart; UNIT what a level is multiplied by in the table (so that scale * level
 * cannot overflow f16: 65504 * 2.51 / 4; the results are multiplied by 1 / UNIT at the end); slice, load, along, merge, across,
 * dim; place, where a part is in each block, and half, where two parts are in one block, are for those who load many times;
 * load_half. n is a constant from 0 to 7 everywhere. */
#ifndef TQ_SLICES_CUH
#define TQ_SLICES_CUH

#include "format.cuh"

#define TQ_LANES 32

/* Word i of the bytes from offset byte on in block b of a row in shared memory; rows begin at multiples of four. Two blocks are
 * a whole number of words, so that where a lane's bytes lie in a word depends on b's parity alone: written so that the compiler
 * sees it and computes two shifts, not one for each block. */
template <int BYTES> TQ_D uint32_t tq_load_word(const uint32_t * row, int b, int byte, int i) {
    const int at = 8 * (byte + (b & 1 ? BYTES : 0));
    const uint32_t * from = row + BYTES / 2 * (b >> 1) + (at >> 5) + i;
    return tq_funnel(from[0], from[1], at);
}

/* Entry (word >> shift) & (ENTRIES - 1) of this lane's copy. Shift and multiplication are one, and the lane is put in by the
 * instruction that masks. */
template <int ENTRIES, int SPACING> TQ_D uint32_t tq_look_up(const uint32_t * table, uint32_t word, int shift) {
    const int up = SPACING == 256 ? 8 : 7;
    const uint32_t lane = 4u * ((uint32_t) tq_thread() % TQ_LANES), mask = (uint32_t) (ENTRIES - 1) * SPACING;
    const uint32_t at = ((shift >= up ? word >> (shift - up) : word << (up - shift)) & mask) | lane;
    return *(const uint32_t *) (const void *) ((const uint8_t *) table + at);
}

TQ_D uint16_t tq_load_half(const uint32_t * row, int byte) {
    return ((const uint16_t *) (const void *) row)[byte >> 1];
}

/* Types of ours whose slice is one word of eight indices of BITS bits. */
template <int BITS> struct tq_packed {
    static const int SCALED = 1;
    static const int ENTRIES = 1 << (2 * BITS);
    /* 24 bits leave room to begin at bit 8, which spares a slice's first look-up its shift if entries are 256 bytes apart. */
    static const int UP = BITS == 3 ? 8 : 0;
    static const int SPACING = BITS == 3 ? 256 : 128;
    static const uint32_t EVEN = (BITS == 3 ? 0x1c71c7u : 0x0f0f0f0fu) << UP; /* indices 0, 2, 4, 6 */
    typedef uint32_t slice;
    struct merged {
        uint32_t even, odd; /* index n of two tokens side by side */
    };

    static TQ_HD float unit() { return 0.25f; }

    static TQ_D uint32_t entry(const float * levels, int i) {
        const int mask = (1 << BITS) - 1;
        return tq_half2(levels[i & mask] * unit(), levels[i >> BITS] * unit());
    }

    /* values n, n + 1 of a slice; n even */
    static TQ_D uint32_t along(const uint32_t * table, const slice & s, int n) {
        return tq_look_up<ENTRIES, SPACING>(table, s, UP + BITS * n);
    }

    /* Bits beyond the eight indices are whatever they are: look_up takes none of them. */
    static TQ_D merged merge(const slice & a, const slice & b) {
        merged m;
        m.even = tq_select(EVEN, a, b << BITS);
        m.odd = tq_select(EVEN, a >> BITS, b);
        return m;
    }

    /* value n of two slices */
    static TQ_D uint32_t across(const uint32_t * table, const merged & m, int n) {
        return tq_look_up<ENTRIES, SPACING>(table, n & 1 ? m.odd : m.even, UP + BITS * (n & ~1));
    }
};

struct tq_pqo3 : tq_packed<3> {
    static const int BYTES = TQI_PQO3_BYTES;
    struct place {
        int word[2], shift[2]; /* in a block that begins a word, and in one that begins in the middle of one */
    };
    struct half {
        int word, selector[2];
    };

    static TQ_D place place_of(int part) {
        place l;
        TQ_UNROLL
        for (int i = 0; i < 2; ++i) {
            const int at = 8 * (i * BYTES + 2 + 3 * part) - UP;
            l.word[i] = tq_keep(at >> 5);
            l.shift[i] = tq_keep(at & 31);
        }
        return l;
    }

    static TQ_D uint32_t load(const uint32_t * row, int b, const place & l) {
        const uint32_t * from = row + BYTES / 2 * (b >> 1) + (b & 1 ? l.word[1] : l.word[0]);
        return tq_funnel(from[0], from[1], b & 1 ? l.shift[1] : l.shift[0]);
    }

    /* Six bytes from an even offset on, which lie in two words. */
    static TQ_D half half_of(int b, int i) {
        const int at = BYTES * b + 2 + 6 * i;
        half l;
        l.word = tq_keep(at / 4);
        l.selector[0] = tq_keep(at % 4 == 0 ? 0x2100 : 0x4320);
        l.selector[1] = tq_keep(at % 4 == 0 ? 0x5430 : 0x7650);
        return l;
    }

    static TQ_D void load_half(const uint32_t * row, const half & l, uint32_t * s) {
        const uint32_t * from = row + l.word;
        s[0] = tq_permute(from[0], from[1], (uint32_t) l.selector[0]);
        s[1] = tq_permute(from[0], from[1], (uint32_t) l.selector[1]);
    }

    static TQ_D int dim(int part, int n) { return 8 * part + n; }
};

/* Of types whose parts need no more than their number to be found. */
template <typename T, typename SLICE> struct tq_plain_places {
    typedef int place;
    struct half {
        int b, i;
    };

    static TQ_D place place_of(int part) { return part; }
    static TQ_D half half_of(int b, int i) { return { b, i }; }

    static TQ_D void load_half(const uint32_t * row, const half & l, SLICE * s) {
        s[0] = T::load(row, l.b, 2 * l.i);
        s[1] = T::load(row, l.b, 2 * l.i + 1);
    }
};

struct tq_pqo4 : tq_packed<4>, tq_plain_places<tq_pqo4, uint32_t> {
    static const int BYTES = TQI_PQO4_BYTES;
    static TQ_D uint32_t load(const uint32_t * row, int b, int part) {
        return tq_load_word<BYTES>(row, b, 2 + 4 * part, 0);
    }
    static TQ_D int dim(int part, int n) { return 8 * part + n; }
};

/* A trellis block's words, shifted so that values 2 part and 2 part + 1 of each byte are bits 0 and 1: the block's words were
 * laid out for that (format.h). Levels of the even ones and of the odd ones, four bytes each. */
template <int BITS> TQ_D void tq_trellis_slice(const uint32_t * row, int b, int part, uint32_t * even, uint32_t * odd) {
    uint32_t words[4] = { 0, 0, 0, 0 };
    TQ_UNROLL
    for (int j = 0; j < BITS; ++j) {
        words[j] = tq_load_word<4 * BITS + 2>(row, b, 2, j);
    }
    const uint32_t low = tq_subset_low(words[0]) >> (2 * part), high = tq_subset_high(words[0]) >> (2 * part);
    *even = (words[1] >> (2 * part) << 2 & 0x0c0c0c0cu) | (high << 1 & 0x02020202u) | (low & 0x01010101u);
    *odd = (words[2] >> (2 * part) << 2 & 0x0c0c0c0cu) | (high & 0x02020202u) | (low >> 1 & 0x01010101u);
    if (BITS == 4) {
        const uint32_t top = words[3] >> (2 * part);
        *even |= top << 4 & 0x10101010u;
        *odd |= top << 3 & 0x10101010u;
    }
}

struct tq_pqt3 : tq_packed<4>, tq_plain_places<tq_pqt3, uint32_t> { /* 16 levels: from here on like pqo4 */
    static const int BYTES = TQI_PQT3_BYTES;
    static TQ_D uint32_t load(const uint32_t * row, int b, int part) {
        uint32_t even, odd;
        tq_trellis_slice<3>(row, b, part, &even, &odd);
        return even | odd << 4;
    }
    static TQ_D int dim(int part, int n) { return 8 * (n / 2) + 2 * part + n % 2; }
};

struct tq_pqt4_slice {
    uint32_t even, odd;
};

struct tq_pqt4 : tq_plain_places<tq_pqt4, tq_pqt4_slice> {
    static const int BYTES = TQI_PQT4_BYTES;
    static const int SCALED = 1;
    static const int ENTRIES = 32;
    static const int SPACING = 128;
    typedef tq_pqt4_slice slice;
    struct merged {
        slice a, b;
    };

    static TQ_HD float unit() { return 0.25f; }
    static TQ_D uint32_t entry(const float * levels, int i) { return tq_half2(levels[i] * unit(), levels[i] * unit()); }

    static TQ_D slice load(const uint32_t * row, int b, int part) {
        slice s;
        tq_trellis_slice<4>(row, b, part, &s.even, &s.odd);
        return s;
    }

    static TQ_D uint32_t look_up(const uint32_t * table, const slice & s, int n) {
        return tq_look_up<ENTRIES, SPACING>(table, n & 1 ? s.odd : s.even, 8 * (n / 2));
    }

    static TQ_D uint32_t along(const uint32_t * table, const slice & s, int n) {
        return tq_permute(look_up(table, s, n), look_up(table, s, n + 1), 0x7610);
    }

    static TQ_D merged merge(const slice & a, const slice & b) {
        merged m;
        m.a = a;
        m.b = b;
        return m;
    }

    static TQ_D uint32_t across(const uint32_t * table, const merged & m, int n) {
        return tq_permute(look_up(table, m.a, n), look_up(table, m.b, n), 0x7610);
    }

    static TQ_D int dim(int part, int n) { return tq_pqt3::dim(part, n); }
};

/* f16 as it is, for the one side of a mixed pair. Its "block" is 32 values. */
struct tq_f16_slice {
    uint32_t pair[4];
};

struct tq_f16 : tq_plain_places<tq_f16, tq_f16_slice> {
    static const int BYTES = 2 * TQ_BLOCK;
    static const int SCALED = 0;
    static const int ENTRIES = 0;
    static const int SPACING = 0;
    typedef tq_f16_slice slice;
    struct merged {
        slice a, b;
    };

    static TQ_HD float unit() { return 1.0f; }
    static TQ_D uint32_t entry(const float *, int) { return 0; }

    static TQ_D slice load(const uint32_t * row, int b, int part) {
        slice s;
        TQ_UNROLL
        for (int i = 0; i < 4; ++i) {
            s.pair[i] = row[BYTES / 4 * b + 4 * part + i];
        }
        return s;
    }

    static TQ_D uint32_t along(const uint32_t *, const slice & s, int n) { return s.pair[n / 2]; }

    static TQ_D merged merge(const slice & a, const slice & b) {
        merged m;
        m.a = a;
        m.b = b;
        return m;
    }

    static TQ_D uint32_t across(const uint32_t *, const merged & m, int n) {
        return tq_permute(m.a.pair[n / 2], m.b.pair[n / 2], n & 1 ? 0x7632 : 0x5410);
    }

    static TQ_D int dim(int part, int n) { return 8 * part + n; }
};

/* The same the other way round: in which part value i of a block is, and as its which. */
struct tq_spot {
    int part, n;
};

TQ_HD tq_spot tq_spot_of(bool trellis, int i) {
    tq_spot s;
    s.part = trellis ? i % 8 / 2 : i / 8;
    s.n = trellis ? 2 * (i / 8) + i % 2 : i % 8;
    return s;
}

TQ_HD bool tq_is_trellis(int type) {
    return type == TQ_TYPE_PQT3 || type == TQ_TYPE_PQT4;
}

template <int TYPE> struct tq_type_of {
    typedef tq_f16 type;
};
template <> struct tq_type_of<TQ_TYPE_PQO3> {
    typedef tq_pqo3 type;
};
template <> struct tq_type_of<TQ_TYPE_PQO4> {
    typedef tq_pqo4 type;
};
template <> struct tq_type_of<TQ_TYPE_PQT3> {
    typedef tq_pqt3 type;
};
template <> struct tq_type_of<TQ_TYPE_PQT4> {
    typedef tq_pqt4 type;
};

template <typename K, typename V> struct tq_one_type {
    static const bool value = false;
};
template <typename T> struct tq_one_type<T, T> {
    static const bool value = true;
};

/* call, with TQ standing for the type that the number means */
#define TQ_WITH_TYPE(type_number, call)                                                                                \
    switch (type_number) {                                                                                             \
        case TQ_TYPE_PQO3: {                                                                                           \
            typedef tq_pqo3 TQ;                                                                                        \
            call;                                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
        case TQ_TYPE_PQO4: {                                                                                           \
            typedef tq_pqo4 TQ;                                                                                        \
            call;                                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
        case TQ_TYPE_PQT3: {                                                                                           \
            typedef tq_pqt3 TQ;                                                                                        \
            call;                                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
        case TQ_TYPE_PQT4: {                                                                                           \
            typedef tq_pqt4 TQ;                                                                                        \
            call;                                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
        default: {                                                                                                     \
            typedef tq_f16 TQ;                                                                                         \
            call;                                                                                                      \
            break;                                                                                                     \
        }                                                                                                              \
    }

/* The scales of two rows' block that begins at byte at, f16 side by side, and finite whatever they are: a weight of 0 must cancel them; 1 for f16 */
template <typename T> TQ_D uint32_t tq_scales(const uint32_t * row0, const uint32_t * row1, int at) {
    return T::SCALED ? tq_finite_halves(tq_load_half(row0, at) | (uint32_t) tq_load_half(row1, at) << 16) : 0x3c003c00u;
}

#endif
