/* codebook.c: the codebooks. Levels of the signed tables were fitted to transformed Gaussian blocks whose scale is
 * searched; the maxnorm and l2norm tables are turboquant-rs's, so that results can be compared with it. */
#include "codebook.h"

#include <math.h>

/* The fixed sign table of the block transform, as in llama.cpp's TQ3 work and turboquant-rs. */
const float tqi_signs[TQ_BLOCK] = {
    +1, -1, +1, +1, -1, -1, +1, -1, +1, +1, -1, +1, -1, +1, -1, -1,
    +1, -1, -1, +1, +1, -1, +1, -1, -1, +1, +1, +1, -1, -1, +1, -1,
};

#define MID(a, b) (0.5f * ((a) + (b)))

/* Scale candidates are factor * the smallest scale that clips no value. These sets minimise the NMSE on Gaussian blocks
 * among all of that size on a grid of 0.02: .0230 (pqo3) and .0053 (pqo4); a fourth member gains less than 0.4 %. */
static const tqi_codec pqo3_search = {
    .type = TQ_TYPE_PQO3, .mode = TQ_MODE_SEARCH, .bits = 3, .n_levels = 8, .block_bytes = TQI_PQO3_BYTES,
    .signs = TQI_SIGNS_FIRST, .n_factors = 3, .factors = { 0.82f, 0.90f, 1.00f }, .outer = 2.219803f,
    .levels = { -1.814201f, -1.106490f, -0.579246f, -0.123892f, 0.312649f, 0.776305f, 1.337817f, 2.219803f },
    .boundaries = {
        MID(-1.814201f, -1.106490f), MID(-1.106490f, -0.579246f), MID(-0.579246f, -0.123892f), MID(-0.123892f, 0.312649f),
        MID(0.312649f, 0.776305f), MID(0.776305f, 1.337817f), MID(1.337817f, 2.219803f), INFINITY,
    },
};

static const tqi_codec pqo4_search = {
    .type = TQ_TYPE_PQO4, .mode = TQ_MODE_SEARCH, .bits = 4, .n_levels = 16, .block_bytes = TQI_PQO4_BYTES,
    .signs = TQI_SIGNS_FIRST, .n_factors = 3, .factors = { 0.92f, 0.97f, 1.03f }, .outer = 2.503710f,
    .levels = {
        -1.999333f, -1.585588f, -1.253617f, -0.968201f, -0.714014f, -0.482657f, -0.263340f, -0.047417f,
        0.170632f, 0.395389f, 0.630699f, 0.882685f, 1.161876f, 1.486655f, 1.906427f, 2.503710f,
    },
    .boundaries = {
        MID(-1.999333f, -1.585588f), MID(-1.585588f, -1.253617f), MID(-1.253617f, -0.968201f), MID(-0.968201f, -0.714014f),
        MID(-0.714014f, -0.482657f), MID(-0.482657f, -0.263340f), MID(-0.263340f, -0.047417f), MID(-0.047417f, 0.170632f),
        MID(0.170632f, 0.395389f), MID(0.395389f, 0.630699f), MID(0.630699f, 0.882685f), MID(0.882685f, 1.161876f),
        MID(1.161876f, 1.486655f), MID(1.486655f, 1.906427f), MID(1.906427f, 2.503710f), INFINITY,
    },
};

static const tqi_codec pqo3_maxnorm = {
    .type = TQ_TYPE_PQO3, .mode = TQ_MODE_MAXNORM, .bits = 3, .n_levels = 8, .block_bytes = TQI_PQO3_BYTES,
    .signs = TQI_SIGNS_LAST, .outer = 2.1573f,
    .levels = { -2.1573f, -1.3336f, -0.7434f, -0.2428f, 0.2428f, 0.7434f, 1.3336f, 2.1573f },
    .boundaries = { -1.7455f, -1.0385f, -0.4931f, 0.0f, 0.4931f, 1.0385f, 1.7455f, INFINITY },
};

/* A uniform grid between the same ends, computed in float: what turboquant-rs uses at four bits. */
#define GRID(i) (-2.1573f + (float) (i) * (2.0f * 2.1573f / 15.0f))

static const tqi_codec pqo4_maxnorm = {
    .type = TQ_TYPE_PQO4, .mode = TQ_MODE_MAXNORM, .bits = 4, .n_levels = 16, .block_bytes = TQI_PQO4_BYTES,
    .signs = TQI_SIGNS_LAST, .outer = 2.1573f,
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
    .type = TQ_TYPE_PQO3, .mode = TQ_MODE_L2NORM, .bits = 3, .n_levels = 8, .block_bytes = TQI_PQO3_BYTES,
    .signs = TQI_SIGNS_LAST,
    .levels = {
        -0.366268f, -0.232461f, -0.131756f, -0.0428515f, 0.0428515f, 0.131756f, 0.232461f, 0.366268f,
    },
    .boundaries = {
        -0.299364507f, -0.182108507f, -0.0873037502f, 0.0f, 0.0873037502f, 0.182108507f, 0.299364507f, INFINITY,
    },
};

static const tqi_codec pqo4_l2norm = {
    .type = TQ_TYPE_PQO4, .mode = TQ_MODE_L2NORM, .bits = 4, .n_levels = 16, .block_bytes = TQI_PQO4_BYTES,
    .signs = TQI_SIGNS_LAST,
    .levels = {
        -0.453428f, -0.349925f, -0.276564f, -0.21619f, -0.162919f, -0.113896f, -0.0674242f, -0.0223293f, 0.0223293f,
        0.0674242f, 0.113896f, 0.162919f, 0.21619f, 0.276564f, 0.349925f, 0.453428f,
    },
    .boundaries = {
        -0.401676506f, -0.313244492f, -0.246377006f, -0.189554498f, -0.138407499f, -0.0906601027f, -0.0448767506f, 0.0f,
        0.0448767506f, 0.0906601027f, 0.138407499f, 0.189554498f, 0.246377006f, 0.313244492f, 0.401676506f, INFINITY,
    },
};

const tqi_codec * tqi_codec_get(int type, int mode) {
    static const tqi_codec * const codecs[] = {
        &pqo3_search, &pqo3_maxnorm, &pqo3_l2norm, &pqo4_search, &pqo4_maxnorm, &pqo4_l2norm,
    };
    for (size_t i = 0; i < sizeof codecs / sizeof codecs[0]; ++i) {
        if (codecs[i]->type == type && codecs[i]->mode == mode) {
            return codecs[i];
        }
    }
    return NULL;
}
