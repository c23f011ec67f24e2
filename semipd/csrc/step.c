/* A whole step of one-token slices, a row each: embedding, layers, head and the best token of every row. The
   calls of one step share the buffers of `Step`, and their work is what the single kernels do, so a row has
   the same bits as through them. */

#include "kernels.h"
#include "simd.h"
#include "team.h"

/* The norms of queries and keys are NULL in families without. window: positions that a query sees, 0 for all. */
typedef struct {
    const Linear *qkv, *output, *gate_up, *down;
    const void *attention_norm, *mlp_norm, *query_norm, *key_norm;
    int64_t window;
} Layer;

/* pool: [layers, 2, blocks, kv_heads, block_size, head_dim]. frequencies: [head_dim / 2]. */
typedef struct {
    int64_t level, half, layers, vocabulary, hidden, intermediate, heads, kv_heads, head_dim, blocks, block_size;
    const Layer *layer;
    const Linear *head;
    const void *embedding, *norm;
    const float *frequencies;
    void *pool;
    double rope_factor;
    float eps, scale;
} Model;

/* Row r computes position positions[r] of slot slots[r]; tokens and tables are indexed by slot. The rest are
   buffers for so many rows: hidden, normed, delta [rows, hidden], qkv [rows, (heads + 2 * kv_heads) * head_dim],
   mixed [rows, heads * head_dim], activated [rows, intermediate], logits [rows, vocabulary], where, cosine, sine
   (see Rotation), items and attention (see DecodePlan), quantized (the most that a quantised layer needs, or
   NULL). best and value: [rows], the results. */
typedef struct {
    int64_t rows;
    const int64_t *slots, *positions;
    const int32_t *tokens, *tables;
    int64_t token_stride, table_stride;
    void *hidden, *normed, *delta, *qkv, *mixed, *activated, *logits, *quantized;
    int64_t *where;
    float *cosine, *sine;
    DecodeItem *items;
    float *attention;
    int64_t *best;
    float *value;
} Step;

EXPORT void semipd_angles(const int64_t *positions, int64_t rows, const float *frequencies, int64_t pairs,
                          double factor, float *cosine, float *sine);

/* Rows of a layer (seen as rows of head_dim) that keep the keys and values of this step's positions. */
static void find_places(const Model *model, const Step *step) {
    int64_t *where = step->where, heads = model->kv_heads;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t position = step->positions[row], offset = position % model->block_size;
        const int32_t *table = step->tables + step->slots[row] * step->table_stride;
        int64_t block = table[position / model->block_size];
        for (int half = 0; half < 2; half++)
            for (int64_t head = 0; head < heads; head++)
                *where++ = ((half * model->blocks + block) * heads + head) * model->block_size + offset;
    }
}

/* Look tokens up, and work out what every layer uses. Returns -1, or the first row whose token is not in the
   vocabulary; then nothing was written that matters. */
EXPORT int64_t semipd_step_begin(const Model *model, const Step *step) {
    size_t bytes = model->hidden * element_size(model->half);
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t token = step->tokens[step->slots[row] * step->token_stride + step->positions[row]];
        if (token < 0 || token >= model->vocabulary) return row;
        memcpy((char *)step->hidden + row * bytes, (const char *)model->embedding + token * bytes, bytes);
    }
    find_places(model, step);
    semipd_angles(step->positions, step->rows, model->frequencies, model->head_dim / 2, model->rope_factor,
                  step->cosine, step->sine);
    norm_in_team(model->level, model->half, step->hidden, NULL, model->layer[0].attention_norm, step->normed,
                 step->rows, model->hidden, model->eps);
    return -1;
}

/* Cut every row's context into items; returns how many. */
static int64_t cut(const Model *model, const Step *step, int64_t window) {
    DecodeItem *item = step->items;
    for (int64_t row = 0; row < step->rows; row++) {
        int64_t end = step->positions[row] + 1, low = window && end > window ? end - window : 0;
        for (int64_t head = 0; head < model->kv_heads; head++)
            for (int64_t part = low / PART; part * PART < end; part++) {
                int64_t first = part * PART > low ? part * PART : low;
                int64_t last = (part + 1) * PART < end ? (part + 1) * PART : end;
                *item++ = (DecodeItem){row, step->slots[row], head, first, last, part - low / PART};
            }
    }
    return item - step->items;
}

static void layer_in_team(const Model *model, const Step *step, int64_t index, int64_t items) {
    const Layer *layer = model->layer + index;
    int64_t rows = step->rows, width = model->hidden, queries = model->heads * model->head_dim;
    int64_t all = queries + 2 * model->kv_heads * model->head_dim;
    int64_t half_pool = model->blocks * model->kv_heads * model->block_size * model->head_dim;
    char *pool = (char *)model->pool + index * 2 * half_pool * element_size(model->half);
    int level = model->level, half = model->half;
    Rotation rotation = {level, half, rows, model->heads, model->kv_heads, model->head_dim, step->where, step->cosine,
                         step->sine, layer->query_norm, layer->key_norm, model->eps};
    DecodePlan plan = {level, half, model->kv_heads, model->heads / model->kv_heads, model->heads, model->head_dim,
                       model->block_size, half_pool, all, step->tables, step->table_stride, step->items, items,
                       step->attention, model->scale};
    linear_in_team(layer->qkv, step->normed, width, rows, step->qkv, all, step->quantized);
    rotate_in_team(&rotation, step->qkv, pool);
    attend_in_team(&plan, step->qkv, pool, step->mixed);
    linear_in_team(layer->output, step->mixed, queries, rows, step->delta, width, step->quantized);
    norm_in_team(level, half, step->hidden, step->delta, layer->mlp_norm, step->normed, rows, width, model->eps);
    linear_in_team(layer->gate_up, step->normed, width, rows, step->activated, model->intermediate, step->quantized);
    linear_in_team(layer->down, step->activated, model->intermediate, rows, step->delta, width, step->quantized);
    const void *following = index + 1 < model->layers ? layer[1].attention_norm : model->norm;
    norm_in_team(level, half, step->hidden, step->delta, following, step->normed, rows, width, model->eps);
}

/* The layers from `first` on, in one region of as many threads as OpenMP is set to now: all, or until the word
   `watched`, looked at after every layer, no longer holds `seen`; a single one where there is no such word.
   Returns the layer to go on with. */
EXPORT int64_t semipd_step_layers(const Model *model, const Step *step, int64_t first, const uint64_t *watched,
                                  uint64_t seen) {
    const Layer *layers = model->layer;
    int64_t index = first, items = 0, stopped = 0; /* stopped: the layer to go on with, 0 until then */
#pragma omp parallel firstprivate(index)
    while (!stopped) {
#pragma omp single
        if (index == first || layers[index].window != layers[index - 1].window)
            items = cut(model, step, layers[index].window);
        layer_in_team(model, step, index++, items);
#pragma omp single
        stopped = index == model->layers || !watched || __atomic_load_n(watched, __ATOMIC_RELAXED) != seen ? index : 0;
    }
    return stopped;
}

/* Logits, and the first largest of each row with its value. */
EXPORT void semipd_step_end(const Model *model, const Step *step) {
    FindBest *find = kernels_of(model->level)->find_best[model->half];
    size_t bytes = model->vocabulary * element_size(model->half);
#pragma omp parallel
    {
        linear_in_team(model->head, step->normed, model->hidden, step->rows, step->logits, model->vocabulary,
                       step->quantized);
#pragma omp for schedule(dynamic, 1)
        for (int64_t row = 0; row < step->rows; row++) {
            Best best = find((const char *)step->logits + row * bytes, model->vocabulary);
            step->best[row] = best.index, step->value[row] = best.value;
        }
    }
}
