/* train_codebooks.c: fits the tables of levels and the factors of a type's scale search to Gaussian blocks.
 *
 *     cc -O3 -march=native -ffp-contract=off -Inative/include -Inative/src benchmarks/quality/train_codebooks.c \
 *         native/src/codebook.c native/src/cpu/portable.c native/src/cpu/trellis_portable.c -lm -o build/train_codebooks
 *     build/train_codebooks pqt2
 *
 * The encoder is the library's portable one, over a codebook that changes. A round is Lloyd's iteration (Lloyd 1957,
 * published 1982): blocks are encoded, and each level becomes the mean of its values in units of their blocks' scales,
 * weighted by the squared scale, which minimises the squared error. The table is then mirrored if its lowest level
 * reaches further than its highest one, and scaled so that the highest stays where it was: 127/64 for the trellis
 * types. Between rounds each factor moves by small steps as long as the error falls. In the end the levels of a trellis
 * type are rounded to 1/64, and the error is measured on blocks that were not trained on.
 *
 * The second argument is how the levels begin: "table", those of the library (default), or "spread", levels of a normal
 * distribution of three times the variance, somewhat higher than symmetric ones. They end at the same error; levels and
 * factors differ from run to run by a few units, because many tables are nearly as good as the best one. The third is
 * the number of blocks to train on, the fourth that of rounds. */
#include "kernels.h"
#include "transform.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>

enum { N_ITERATIONS = 8, N_SEARCH = 16384, N_BLOCKS = 65536, N_ROUNDS = 5 };

#define FACTOR_STEP 0.02f

static uint64_t state = 1;

/* Uniform between 0 and 1: splitmix64. */
static double uniform(void) {
    uint64_t z = (state += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return ((double) ((z ^ (z >> 31)) >> 11) + 0.5) / 9007199254740992.0;
}

/* Normal values (Box and Muller 1958): (n_blocks, TQ_BLOCK). */
static float * make_blocks(int n_blocks) {
    float * x = malloc((size_t) n_blocks * TQ_BLOCK * sizeof(float));
    for (int i = 0; x != NULL && i < n_blocks * TQ_BLOCK; i += 2) {
        const double radius = sqrt(-2.0 * log(uniform())), angle = 6.283185307179586 * uniform();
        x[i] = (float) (radius * cos(angle));
        x[i + 1] = (float) (radius * sin(angle));
    }
    return x;
}

/* Boundaries are midway between neighbours: in a subset, for the trellis types. */
static void set_boundaries(tqi_codec * codec) {
    const int apart = codec->trellis ? 4 : 1;
    for (int j = 0; j < codec->n_levels; ++j) {
        codec->boundaries[j] =
            j + apart < codec->n_levels ? 0.5f * (codec->levels[j] + codec->levels[j + apart]) : INFINITY;
    }
}

/* The squared error over the squared values. With sums it also adds up, per level, scale times value and squared scale:
 * (n_levels) each. */
static double measure(const tqi_codec * codec, const float * x, int n_blocks, double * value, double * weight) {
    const tqi_steps * steps = tqi_steps_of(&tqi_kernels_portable, codec);
    tqi_codec numbers = *codec; /* its levels are their own numbers */
    for (int j = 0; j < codec->n_levels; ++j) {
        numbers.levels[j] = (float) j;
    }
    double error = 0.0, energy = 0.0;
    for (int b = 0; b < n_blocks; ++b, x += TQ_BLOCK) {
        uint8_t block[TQI_BLOCK_BYTES(5)];
        float y[TQ_BLOCK], index[TQ_BLOCK];
        steps->encode(codec, x, 1, block);
        steps->unpack(&numbers, block, 1, index);
        const float d = tqi_block_scale(block);
        memcpy(y, x, sizeof y);
        tqi_transform(codec->signs, y);
        for (int i = 0; i < TQ_BLOCK; ++i) {
            const int j = d != 0.0f ? (int) lrintf(index[i] / d) : 0;
            const double off = y[i] - d * codec->levels[j];
            error += off * off;
            energy += (double) y[i] * y[i];
            if (value != NULL) {
                value[j] += (double) d * y[i];
                weight[j] += (double) d * d;
            }
        }
    }
    return error / energy;
}

/* One iteration of Lloyd's; returns the error before it. */
static double improve_levels(tqi_codec * codec, const float * x, int n_blocks, float highest) {
    double value[TQI_MAX_LEVELS] = { 0 }, weight[TQI_MAX_LEVELS] = { 0 };
    const int n = codec->n_levels;
    const double error = measure(codec, x, n_blocks, value, weight);
    float mean[TQI_MAX_LEVELS];
    for (int j = 0; j < n; ++j) {
        mean[j] = weight[j] > 0.0 ? (float) (value[j] / weight[j]) : codec->levels[j];
    }
    const int mirror = -mean[0] > mean[n - 1];
    const float scale = highest / (mirror ? -mean[0] : mean[n - 1]);
    for (int j = 0; j < n; ++j) {
        codec->levels[j] = scale * (mirror ? -mean[n - 1 - j] : mean[j]);
    }
    set_boundaries(codec);
    return error;
}

/* Moves each factor as long as the error falls, in steps that are halved twice. */
static void improve_factors(tqi_codec * codec, const float * x, int n_blocks) {
    double best = measure(codec, x, n_blocks, NULL, NULL);
    for (float step = FACTOR_STEP; step > 0.2f * FACTOR_STEP; step *= 0.5f) {
        for (int improved = 1; improved;) {
            improved = 0;
            for (int k = 0; k < 2 * codec->n_factors; ++k) {
                const float old = codec->factors[k / 2];
                codec->factors[k / 2] = old + (k % 2 ? -step : step);
                const double error = measure(codec, x, n_blocks, NULL, NULL);
                if (error < best * (1.0 - 1e-5)) {
                    best = error;
                    improved = 1;
                } else {
                    codec->factors[k / 2] = old;
                }
            }
        }
    }
}

/* Levels where a normal distribution of variance 3 has equal parts between them, but 0.12 of a part higher. */
static void spread_levels(tqi_codec * codec, float highest) {
    const int n = codec->n_levels;
    for (int j = 0; j < n; ++j) {
        double low = -20.0, high = 20.0;
        for (int i = 0; i < 60; ++i) {
            const double middle = 0.5 * (low + high), below = 0.5 * erfc(-middle / sqrt(6.0));
            *(below < (j + 0.62) / (n + 0.1) ? &low : &high) = middle;
        }
        codec->levels[j] = (float) low;
    }
    const float scale = highest / codec->levels[n - 1];
    for (int j = 0; j < n; ++j) {
        codec->levels[j] *= scale;
    }
    set_boundaries(codec);
}

static void round_levels(tqi_codec * codec) {
    for (int j = 0; j < codec->n_levels; ++j) {
        codec->levels[j] = rintf(codec->levels[j] / TQI_LEVEL_UNIT) * TQI_LEVEL_UNIT;
    }
    set_boundaries(codec);
}

static void print_codec(const tqi_codec * codec) {
    printf("factors");
    for (int k = 0; k < codec->n_factors; ++k) {
        printf(" %.3f", (double) codec->factors[k]);
    }
    printf("\nlevels");
    for (int j = 0; j < codec->n_levels; ++j) {
        printf(codec->trellis ? " %.0f" : " %f",
               (double) (codec->levels[j] / (codec->trellis ? TQI_LEVEL_UNIT : 1.0f)));
    }
    printf("\n");
}

static const tqi_codec * find_codec(const char * name) {
    static const char * const names[] = { "pqo3", "pqo4", "pqt3", "pqt4", "pqt2", "pqt5" };
    for (size_t i = 0; i < sizeof names / sizeof names[0]; ++i) {
        if (strcmp(name, names[i]) == 0) {
            return tqi_codec_get(TQ_TYPE_PQO3 + (int) i, TQ_MODE_SEARCH);
        }
    }
    return NULL;
}

int main(int argc, char ** argv) {
    const tqi_codec * old = argc > 1 ? find_codec(argv[1]) : NULL;
    const char * start = argc > 2 ? argv[2] : "table";
    const int n_blocks = argc > 3 ? atoi(argv[3]) : N_BLOCKS, n_rounds = argc > 4 ? atoi(argv[4]) : N_ROUNDS;
    if (old == NULL || (strcmp(start, "table") != 0 && strcmp(start, "spread") != 0) || n_blocks < 1 || n_rounds < 0) {
        fprintf(stderr, "usage: train_codebooks TYPE [table|spread] [BLOCKS] [ROUNDS]; types are pqo3, pqo4, pqt2, "
                        "pqt3, pqt4, pqt5\n");
        return 2;
    }
    float *x = make_blocks(n_blocks), *fresh = make_blocks(n_blocks);
    if (x == NULL || fresh == NULL) {
        fprintf(stderr, "train_codebooks: no memory for %d blocks\n", n_blocks);
        return 1;
    }
    const float highest = old->levels[old->n_levels - 1];
    tqi_codec codec = *old;
    if (strcmp(start, "spread") == 0) {
        spread_levels(&codec, highest);
    }
    for (int round = 0; round < n_rounds; ++round) {
        double error = 0.0;
        for (int i = 0; i < N_ITERATIONS; ++i) {
            error = improve_levels(&codec, x, n_blocks, highest);
        }
        improve_factors(&codec, x, n_blocks < N_SEARCH ? n_blocks : N_SEARCH);
        fprintf(stderr, "round %d: NMSE %.6f\n", round + 1, error);
    }
    if (codec.trellis) {
        round_levels(&codec);
    }
    print_codec(&codec);
    printf("NMSE of the library's table: %.6f\n", measure(old, fresh, n_blocks, NULL, NULL));
    printf("NMSE of this one: %.6f\n", measure(&codec, fresh, n_blocks, NULL, NULL));
    free(x);
    free(fresh);
    return 0;
}
