/* dotprod.c: attention with the PQO types by ARMv8.2's dot products of bytes (lanes_neon.h). All else is neon.c's. */
#include "pqo_levels_neon.h"

#include "products_dotprod.h"

#include "lanes_neon.h"

#define BY_BITS TQI_BY_BITS
#define ATTENTION_ONLY
#include "steps.h"
#include "tiles_neon.h"

static const tqi_tiles tiles = { load_queries, tile_scores, tile_accumulate };

const tqi_steps tqi_pqo_dotprod = { tqi_pqo_encode_neon, tqi_pqo_unpack_neon, load_query, scores, accumulate, &tiles };

/* A query vector at a time gives smmla little to save; tiles do. */
const tqi_steps tqi_pqo_i8mm = { tqi_pqo_encode_neon, tqi_pqo_unpack_neon, load_query, scores,
                                 accumulate,          &tqi_pqo_tiles_i8mm };
