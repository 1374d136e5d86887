/* codebook.c: the codebooks. Levels of the signed tables were fitted to transformed Gaussian blocks whose scale is
 * searched; the maxnorm and l2norm tables are turboquant-rs's, so that results can be compared with it. */
#include "codebook.h"

#include <math.h>

/* The fixed sign table of the block transform, as in llama.cpp's TQ3 work and turboquant-rs. */
const float tqi_signs[TQ_BLOCK] = {
    +1, -1, +1, +1, -1, -1, +1, -1, +1, +1, -1, +1, -1, +1, -1, -1,
    +1, -1, -1, +1, +1, -1, +1, -1, -1, +1, +1, +1, -1, -1, +1, -1,
};

/* A codec's type, bits, mode, order of signs, and number of levels. */
#define CODEC(name, of_bits, of_mode, order, n)                                                                        \
    .type = TQ_TYPE_##name##of_bits, .mode = TQ_MODE_##of_mode, .bits = of_bits, .n_levels = n,                        \
    .block_bytes = TQI_BLOCK_BYTES(of_bits), .signs = TQI_SIGNS_##order

#define MID(a, b) (0.5f * ((a) + (b)))

/* Scale candidates are factor * the smallest scale that clips no value. These sets minimise the NMSE on Gaussian blocks
 * among all of that size on a grid of 0.02: .0230 (pqo3) and .0053 (pqo4); a fourth member gains less than 0.4 %. */
static const tqi_codec pqo3_search = {
    CODEC(PQO, 3, SEARCH, FIRST, 8), .n_factors = 3, .factors = { 0.82f, 0.90f, 1.00f }, .outer = 2.219803f,
    .levels = { -1.814201f, -1.106490f, -0.579246f, -0.123892f, 0.312649f, 0.776305f, 1.337817f, 2.219803f },
    .boundaries = {
        MID(-1.814201f, -1.106490f), MID(-1.106490f, -0.579246f), MID(-0.579246f, -0.123892f),
        MID(-0.123892f, 0.312649f), MID(0.312649f, 0.776305f), MID(0.776305f, 1.337817f), MID(1.337817f, 2.219803f),
        INFINITY,
    },
};

static const tqi_codec pqo4_search = {
    CODEC(PQO, 4, SEARCH, FIRST, 16), .n_factors = 3, .factors = { 0.92f, 0.97f, 1.03f }, .outer = 2.503710f,
    .levels = {
        -1.999333f, -1.585588f, -1.253617f, -0.968201f, -0.714014f, -0.482657f, -0.263340f, -0.047417f,
        0.170632f, 0.395389f, 0.630699f, 0.882685f, 1.161876f, 1.486655f, 1.906427f, 2.503710f,
    },
    .boundaries = {
        MID(-1.999333f, -1.585588f), MID(-1.585588f, -1.253617f), MID(-1.253617f, -0.968201f),
        MID(-0.968201f, -0.714014f), MID(-0.714014f, -0.482657f), MID(-0.482657f, -0.263340f),
        MID(-0.263340f, -0.047417f), MID(-0.047417f, 0.170632f), MID(0.170632f, 0.395389f), MID(0.395389f, 0.630699f),
        MID(0.630699f, 0.882685f), MID(0.882685f, 1.161876f), MID(1.161876f, 1.486655f), MID(1.486655f, 1.906427f),
        MID(1.906427f, 2.503710f), INFINITY,
    },
};

static const tqi_codec pqo3_maxnorm = {
    CODEC(PQO, 3, MAXNORM, LAST, 8),
    .outer = 2.1573f,
    .levels = { -2.1573f, -1.3336f, -0.7434f, -0.2428f, 0.2428f, 0.7434f, 1.3336f, 2.1573f },
    .boundaries = { -1.7455f, -1.0385f, -0.4931f, 0.0f, 0.4931f, 1.0385f, 1.7455f, INFINITY },
};

/* A uniform grid between the same ends, computed in float: what turboquant-rs uses at four bits. */
#define GRID(i) (-2.1573f + (float) (i) * (2.0f * 2.1573f / 15.0f))

static const tqi_codec pqo4_maxnorm = {
    CODEC(PQO, 4, MAXNORM, LAST, 16), .outer = 2.1573f,
    .levels = {
        GRID(0), GRID(1), GRID(2), GRID(3), GRID(4), GRID(5), GRID(6), GRID(7),
        GRID(8), GRID(9), GRID(10), GRID(11), GRID(12), GRID(13), GRID(14), GRID(15),
    },
    .boundaries = {
        GRID(0.5), GRID(1.5), GRID(2.5), GRID(3.5), GRID(4.5), GRID(5.5), GRID(6.5), GRID(7.5),
        GRID(8.5), GRID(9.5), GRID(10.5), GRID(11.5), GRID(12.5), GRID(13.5), GRID(14.5), INFINITY,
    },
};

/* Lloyd-Max quantisers of one coordinate of a random unit vector in R^32, density proportional to (1 - t^2)^(29/2);
 * tqgguf/reference.py computes them and a test compares. Boundaries are the midpoints. */
static const tqi_codec pqo3_l2norm = {
    CODEC(PQO, 3, L2NORM, LAST, 8),
    .levels = {
        -0.366268f, -0.232461f, -0.131756f, -0.0428515f, 0.0428515f, 0.131756f, 0.232461f, 0.366268f,
    },
    .boundaries = {
        -0.299364507f, -0.182108507f, -0.0873037502f, 0.0f, 0.0873037502f, 0.182108507f, 0.299364507f, INFINITY,
    },
};

static const tqi_codec pqo4_l2norm = {
    CODEC(PQO, 4, L2NORM, LAST, 16),
    .levels = {
        -0.453428f, -0.349925f, -0.276564f, -0.21619f, -0.162919f, -0.113896f, -0.0674242f, -0.0223293f, 0.0223293f,
        0.0674242f, 0.113896f, 0.162919f, 0.21619f, 0.276564f, 0.349925f, 0.453428f,
    },
    .boundaries = {
        -0.401676506f, -0.313244492f, -0.246377006f, -0.189554498f, -0.138407499f, -0.0906601027f, -0.0448767506f, 0.0f,
        0.0448767506f, 0.0906601027f, 0.138407499f, 0.189554498f, 0.246377006f, 0.313244492f, 0.401676506f, INFINITY,
    },
};

/* The trellis types' levels, in units of 1/64: small integers, so that one instruction can look up 16 to 64 of them;
 * the rounding costs less than 0.2 % in NMSE, at 64 levels 1 %. */
/* clang-format off */
#define PQT2_LEVELS(X) X(-96) X(-54) X(-28) X(-6) X(16) X(39) X(69) X(127)
#define PQT3_LEVELS(X)                                                                                                 \
    X(-101) X(-75) X(-57) X(-44) X(-32) X(-22) X(-12) X(-3) X(7) X(16) X(27) X(38) X(51) X(66) X(90) X(127)
#define PQT4_LEVELS(X)                                                                                                 \
    X(-104) X(-87) X(-74) X(-64) X(-56) X(-50) X(-43) X(-38) X(-33) X(-28) X(-23) X(-19) X(-14) X(-10) X(-5) X(-1)     \
    X(3) X(8) X(12) X(17) X(22) X(27) X(33) X(38) X(44) X(50) X(57) X(65) X(75) X(86) X(100) X(127)
#define PQT5_LEVELS(X)                                                                                                 \
    X(-122) X(-111) X(-100) X(-91) X(-84) X(-77) X(-71) X(-66) X(-62) X(-58) X(-54) X(-50) X(-47) X(-44) X(-41)        \
    X(-38) X(-36) X(-33) X(-30) X(-28) X(-25) X(-23) X(-21) X(-19) X(-16) X(-14) X(-11) X(-10) X(-7) X(-5) X(-3)       \
    X(-1) X(2) X(4) X(6) X(8) X(11) X(12) X(15) X(17) X(20) X(22) X(24) X(26) X(29) X(31) X(34) X(37) X(40) X(43)      \
    X(46) X(49) X(52) X(56) X(60) X(64) X(68) X(73) X(79) X(85) X(92) X(100) X(111) X(127)
/* clang-format on */

#define UNITS(i) (i),
#define LEVEL(i) (float) (i) * TQI_LEVEL_UNIT,
#define MIDWAY(i, j) (0.5f * TQI_LEVEL_UNIT * (float) ((i) + (j)))

/* Bits, number of levels, and cut of a trellis type. A cut of 32 gains 0.6 % in NMSE. The bytes of pqt3 and pqt4 must
 * not change, and pqt5 is spared the time. */
#define TRELLIS(of_bits, n, of_cut) CODEC(PQT, of_bits, SEARCH, FIRST, n), .trellis = 1, .cut = (of_cut), .n_factors = 4

/* Those of pqt2 and pqt5 are from benchmarks/quality/train_codebooks.c. Factors of the others are the best of several
 * dozen sets tried. NMSE: .0700, .0169, .0041 and .0010. */
static const tqi_codec pqt2_search = {
    TRELLIS(2, 8, 32), .factors = { 0.68f, 0.765f, 0.85f, 0.955f },
    .level_units = { PQT2_LEVELS(UNITS) },
    .levels = { PQT2_LEVELS(LEVEL) },
    .boundaries = {
        MIDWAY(-96, 16), MIDWAY(-54, 39), MIDWAY(-28, 69), MIDWAY(-6, 127),
    },
};

static const tqi_codec pqt3_search = {
    TRELLIS(3, 16, 16), .factors = { 0.78f, 0.86f, 0.94f, 1.04f },
    .level_units = { PQT3_LEVELS(UNITS) },
    .levels = { PQT3_LEVELS(LEVEL) },
    .boundaries = {
        MIDWAY(-101, -32), MIDWAY(-75, -22), MIDWAY(-57, -12), MIDWAY(-44, -3), MIDWAY(-32, 7), MIDWAY(-22, 16),
        MIDWAY(-12, 27), MIDWAY(-3, 38), MIDWAY(7, 51), MIDWAY(16, 66), MIDWAY(27, 90), MIDWAY(38, 127),
    },
};

static const tqi_codec pqt4_search = {
    TRELLIS(4, 32, 16), .factors = { 0.88f, 0.93f, 0.98f, 1.04f },
    .level_units = { PQT4_LEVELS(UNITS) },
    .levels = { PQT4_LEVELS(LEVEL) },
    .boundaries = {
        MIDWAY(-104, -56), MIDWAY(-87, -50), MIDWAY(-74, -43), MIDWAY(-64, -38), MIDWAY(-56, -33), MIDWAY(-50, -28),
        MIDWAY(-43, -23), MIDWAY(-38, -19), MIDWAY(-33, -14), MIDWAY(-28, -10), MIDWAY(-23, -5), MIDWAY(-19, -1),
        MIDWAY(-14, 3), MIDWAY(-10, 8), MIDWAY(-5, 12), MIDWAY(-1, 17), MIDWAY(3, 22), MIDWAY(8, 27), MIDWAY(12, 33),
        MIDWAY(17, 38), MIDWAY(22, 44), MIDWAY(27, 50), MIDWAY(33, 57), MIDWAY(38, 65), MIDWAY(44, 75), MIDWAY(50, 86),
        MIDWAY(57, 100), MIDWAY(65, 127),
    },
};

static const tqi_codec pqt5_search = {
    TRELLIS(5, 64, 16), .factors = { 0.97f, 0.985f, 1.00f, 1.015f },
    .level_units = { PQT5_LEVELS(UNITS) },
    .levels = { PQT5_LEVELS(LEVEL) },
    .boundaries = {
        MIDWAY(-122, -84), MIDWAY(-111, -77), MIDWAY(-100, -71), MIDWAY(-91, -66), MIDWAY(-84, -62), MIDWAY(-77, -58),
        MIDWAY(-71, -54), MIDWAY(-66, -50), MIDWAY(-62, -47), MIDWAY(-58, -44), MIDWAY(-54, -41), MIDWAY(-50, -38),
        MIDWAY(-47, -36), MIDWAY(-44, -33), MIDWAY(-41, -30), MIDWAY(-38, -28), MIDWAY(-36, -25), MIDWAY(-33, -23),
        MIDWAY(-30, -21), MIDWAY(-28, -19), MIDWAY(-25, -16), MIDWAY(-23, -14), MIDWAY(-21, -11), MIDWAY(-19, -10),
        MIDWAY(-16, -7), MIDWAY(-14, -5), MIDWAY(-11, -3), MIDWAY(-10, -1), MIDWAY(-7, 2), MIDWAY(-5, 4),
        MIDWAY(-3, 6), MIDWAY(-1, 8), MIDWAY(2, 11), MIDWAY(4, 12), MIDWAY(6, 15), MIDWAY(8, 17), MIDWAY(11, 20),
        MIDWAY(12, 22), MIDWAY(15, 24), MIDWAY(17, 26), MIDWAY(20, 29), MIDWAY(22, 31), MIDWAY(24, 34), MIDWAY(26, 37),
        MIDWAY(29, 40), MIDWAY(31, 43), MIDWAY(34, 46), MIDWAY(37, 49), MIDWAY(40, 52), MIDWAY(43, 56), MIDWAY(46, 60),
        MIDWAY(49, 64), MIDWAY(52, 68), MIDWAY(56, 73), MIDWAY(60, 79), MIDWAY(64, 85), MIDWAY(68, 92),
        MIDWAY(73, 100), MIDWAY(79, 111), MIDWAY(85, 127),
    },
};

const tqi_codec * tqi_codec_get(int type, int mode) {
    static const tqi_codec * const codecs[] = {
        &pqo3_search, &pqo3_maxnorm, &pqo3_l2norm, &pqo4_search, &pqo4_maxnorm,
        &pqo4_l2norm, &pqt3_search,  &pqt4_search, &pqt2_search, &pqt5_search,
    };
    for (size_t i = 0; i < sizeof codecs / sizeof codecs[0]; ++i) {
        if (codecs[i]->type == type && codecs[i]->mode == mode) {
            return codecs[i];
        }
    }
    return NULL;
}
