/* A whole step, from its slices to the tokens in the slot table: what it asks for is checked, then come embedding,
   layers, head and the best token of every row that one is wanted of. The calls of one step share the buffers of
   `Step`, and their work is what the single kernels do, so a row has the same bits as through them.

   All of it is here, and not in Python, since a step streams more weights than any cache holds: what a computation
   begins with afterwards is read from memory, and an interpreter reads a hundred times what these loops do. */

#include <math.h>

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

/* Compute positions first .. first + count - 1 of a slot; wanted: and the token that follows them. More than one
   position needs AMX and bfloat16. */
typedef struct {
    int64_t slot, first, count, wanted;
} Slice;

/* The slot table (execute/storage.py). Of a slot, tokens and tables have a row, the rest an entry. */
typedef struct {
    int64_t slots, max_length, token_stride, table_stride;
    int32_t *tokens;
    const int32_t *tables, *ban_until, *prompt_logprobs;
    const uint8_t *opened, *special;
} Slots;

/* How much the buffers of a step hold: rows, those that a token is wanted of, items of a DecodePlan, and positions of
   one slice of a PrefillPlan. */
typedef struct {
    int64_t rows, sampled, items, packed;
} Size;

/* The slices' positions are the step's rows, one slice after another. need: what this step takes; room: what there
   is. The buffers for `room` are: hidden, normed, delta [rows, hidden], qkv [rows, (heads + 2 * kv_heads) *
   head_dim], mixed [rows, heads * head_dim], activated [rows, intermediate], logits [sampled, vocabulary], positions
   [rows], where, cosine, sine (see Rotation), items and attention (see DecodePlan), packed (see PrefillPlan),
   quantized (the most that a quantised layer needs, or NULL). best and value: [sampled], the results; others
   [sampled]: those results, `other_count` in all, that are not the token yet, since their slots want more than the
   best. broken: the first result that is no finite number. longer: whether there may be more than one position. */
typedef struct {
    int64_t count;
    const Slice *slices;
    const Slots *slots;
    int64_t longer, broken, other_count;
    Size need, room;
    void *hidden, *normed, *delta, *qkv, *mixed, *activated, *logits, *quantized, *packed;
    int64_t *positions, *where;
    float *cosine, *sine;
    DecodeItem *items;
    float *attention;
    int64_t *best, *others;
    float *value;
} Step;

EXPORT void semipd_angles(const int64_t *positions, int64_t rows, const float *frequencies, int64_t pairs,
                          double factor, float *cosine, float *sine);

/* Rows of a layer (seen as rows of head_dim) that keep the keys and values of a position; `where` after them. */
static int64_t *find_places(const Model *model, const int32_t *table, int64_t position, int64_t *where) {
    int64_t offset = position % model->block_size, block = table[position / model->block_size];
    for (int half = 0; half < 2; half++)
        for (int64_t head = 0; head < model->kv_heads; head++)
            *where++ = ((half * model->blocks + block) * model->kv_heads + head) * model->block_size + offset;
    return where;
}

/* Whether the slices are for `Step`: within open slots, and nothing is to be told of prompts. Finds `need`. */
static int check(const Model *model, Step *step) {
    const Slots *slots = step->slots;
    int64_t rows = 0, sampled = 0, end = 0;
    for (const Slice *slice = step->slices; slice < step->slices + step->count; slice++) {
        if (slice->slot < 0 || slice->slot >= slots->slots || !slots->opened[slice->slot]) return 0;
        if (slice->first < 0 || slice->count < 1 || slice->first > slots->max_length - slice->count) return 0;
        if (slots->prompt_logprobs[slice->slot] >= 0 || (slice->count > 1 && !step->longer)) return 0;
        rows += slice->count, sampled += slice->wanted;
        if (slice->first + slice->count > end) end = slice->first + slice->count;
    }
    int64_t items = step->count * model->kv_heads * (end / PART + 1);
    step->need = (Size){rows, sampled, items, rows > step->count ? end : 0};
    return 1;
}

static int fits(Size need, Size room) {
    return need.rows <= room.rows && need.sampled <= room.sampled && need.items <= room.items &&
           need.packed <= room.packed;
}

enum { FINISHED = 0, REFUSED = -1, NO_ROOM = -2, BROKEN = -3, OTHERS = -4 }; /* also in model/step.py */

/* Check the slices, look their tokens up, and work out what every layer uses. REFUSED: the step is for another way,
   which says what is wrong if anything is; NO_ROOM: it needs larger buffers, and then this call again; else 0.
   Nothing was written that matters. */
static int64_t begin(const Model *model, Step *step) {
    if (!check(model, step)) return REFUSED;
    if (!fits(step->need, step->room)) return NO_ROOM;
    size_t bytes = model->hidden * element_size(model->half);
    int64_t *where = step->where, *to = step->positions;
    char *hidden = step->hidden;
    for (const Slice *slice = step->slices; slice < step->slices + step->count; slice++) {
        const int32_t *tokens = step->slots->tokens + slice->slot * step->slots->token_stride;
        const int32_t *table = step->slots->tables + slice->slot * step->slots->table_stride;
        for (int64_t i = 0; i < slice->count; i++, hidden += bytes) {
            int64_t position = *to++ = slice->first + i, token = tokens[position];
            if (token < 0 || token >= model->vocabulary) return REFUSED;
            memcpy(hidden, (const char *)model->embedding + token * bytes, bytes);
            where = find_places(model, table, position, where);
        }
    }
    semipd_angles(step->positions, step->need.rows, model->frequencies, model->head_dim / 2, model->rope_factor,
                  step->cosine, step->sine);
    return 0;
}

/* Cut the contexts of single positions into items; returns how many. */
static int64_t cut(const Model *model, const Step *step, int64_t window) {
    DecodeItem *item = step->items;
    int64_t row = 0;
    for (const Slice *slice = step->slices; slice < step->slices + step->count; row += slice++->count) {
        if (slice->count > 1) continue;
        int64_t end = slice->first + 1, low = window && end > window ? end - window : 0;
        for (int64_t head = 0; head < model->kv_heads; head++)
            for (int64_t part = low / PART; part * PART < end; part++) {
                int64_t first = part * PART > low ? part * PART : low;
                int64_t last = (part + 1) * PART < end ? (part + 1) * PART : end;
                *item++ = (DecodeItem){row, slice->slot, head, first, last, part - low / PART};
            }
    }
    return item - step->items;
}

/* Norms may add what the layer before left in `delta`. */
static void norm(const Model *model, const Step *step, int64_t rows, const void *delta, const void *weight) {
    norm_in_team(model->level, model->half, step->hidden, delta, weight, step->normed, rows, model->hidden, model->eps);
}

static void project(const Model *model, const Step *step, const Layer *layer, void *pool) {
    int64_t all = (model->heads + 2 * model->kv_heads) * model->head_dim;
    Rotation rotation = {model->level, model->half, step->need.rows, model->heads, model->kv_heads, model->head_dim,
                         step->where, step->cosine, step->sine, layer->query_norm, layer->key_norm, model->eps};
    norm(model, step, step->need.rows, layer == model->layer ? NULL : step->delta, layer->attention_norm);
    linear_in_team(layer->qkv, step->normed, model->hidden, step->need.rows, step->qkv, all, step->quantized);
#pragma omp barrier
    rotate_in_team(&rotation, step->qkv, pool);
}

static void attend(const Model *model, const Step *step, const Layer *layer, const void *pool, int64_t items) {
    int64_t all = (model->heads + 2 * model->kv_heads) * model->head_dim, row = 0;
    int64_t half_pool = model->blocks * model->kv_heads * model->block_size * model->head_dim;
    DecodePlan plan = {model->level, model->half, model->kv_heads, model->heads / model->kv_heads, model->heads,
                       model->head_dim, model->block_size, half_pool, all, step->slots->tables,
                       step->slots->table_stride, step->items, items, step->attention, model->scale};
    if (items) attend_in_team(&plan, step->qkv, pool, step->mixed);
    for (const Slice *slice = step->slices; slice < step->slices + step->count; row += slice++->count) {
        if (slice->count == 1) continue;
        int64_t low = layer->window && slice->first >= layer->window ? slice->first - layer->window + 1 : 0;
        int64_t base = low / PART * PART, padded = ROUND_UP(slice->first + slice->count - base, 32);
        PrefillPlan longer = {model->kv_heads, model->heads, model->head_dim, model->block_size, half_pool, all, row,
                              slice->first, slice->count, layer->window, base, padded,
                              step->slots->tables + slice->slot * step->slots->table_stride, step->packed,
                              model->scale};
        prefill_in_team(&longer, step->qkv, pool, step->mixed);
    }
}

/* After the last attention only the rows matter that a token is wanted of: the last of some slices. */
static void keep_wanted(const Model *model, const Step *step) {
    size_t element = element_size(model->half), hidden = model->hidden * element;
    size_t mixed = model->heads * model->head_dim * element;
    int64_t from = -1, to = 0;
#pragma omp single
    for (const Slice *slice = step->slices; slice < step->slices + step->count; slice++) {
        from += slice->count;
        if (!slice->wanted || to++ == from) continue;
        memcpy((char *)step->hidden + (to - 1) * hidden, (char *)step->hidden + from * hidden, hidden);
        memcpy((char *)step->mixed + (to - 1) * mixed, (char *)step->mixed + from * mixed, mixed);
    }
}

enum { PROJECT, ATTEND, EXPAND, CONTRACT, STAGES }; /* of a layer; after the last one comes the head */

/* Logits, and the first largest of each row with its value. */
static void head(const Model *model, const Step *step) {
    FindBest *find = kernels_of(model->level)->find_best[model->half];
    size_t bytes = model->vocabulary * element_size(model->half);
    norm(model, step, step->need.sampled, step->delta, model->norm);
    linear_in_team(model->head, step->normed, model->hidden, step->need.sampled, step->logits, model->vocabulary,
                   step->quantized);
#pragma omp barrier
#pragma omp for schedule(dynamic, 1) nowait
    for (int64_t row = 0; row < step->need.sampled; row++) {
        Best best = find((const char *)step->logits + row * bytes, model->vocabulary);
        step->best[row] = best.index, step->value[row] = best.value;
    }
}

/* Its end is not waited for. */
static void stage_in_team(const Model *model, const Step *step, int64_t index, int64_t items) {
    const Layer *layer = model->layer + index / STAGES;
    int last = index / STAGES == model->layers - 1;
    int64_t rows = last ? step->need.sampled : step->need.rows, width = model->hidden;
    int64_t queries = model->heads * model->head_dim;
    int64_t size = 2 * model->blocks * model->kv_heads * model->block_size * model->head_dim;
    char *pool = (char *)model->pool + index / STAGES * size * element_size(model->half);
    if (index == model->layers * STAGES) head(model, step);
    else if (index % STAGES == PROJECT) project(model, step, layer, pool);
    else if (index % STAGES == ATTEND) {
        attend(model, step, layer, pool, items);
        if (last && rows < step->need.rows) keep_wanted(model, step);
        linear_in_team(layer->output, step->mixed, queries, rows, step->delta, width, step->quantized);
    } else if (index % STAGES == EXPAND) {
        norm(model, step, rows, step->delta, layer->mlp_norm);
        linear_in_team(layer->gate_up, step->normed, width, rows, step->activated, model->intermediate,
                       step->quantized);
    } else
        linear_in_team(layer->down, step->activated, model->intermediate, rows, step->delta, width, step->quantized);
}

/* Write the tokens that are chosen, unless a result is broken, and note the others. */
static int64_t finish(Step *step) {
    const Slots *slots = step->slots;
    int64_t row = step->other_count = 0;
    for (step->broken = 0; step->broken < step->need.sampled; step->broken++)
        if (!isfinite(step->value[step->broken])) return BROKEN;
    for (const Slice *slice = step->slices; slice < step->slices + step->count; slice++) {
        if (!slice->wanted) continue;
        int64_t slot = slice->slot, position = slice->first + slice->count;
        if (slots->special[slot] || position < slots->ban_until[slot]) step->others[step->other_count++] = row;
        else slots->tokens[slot * slots->token_stride + position] = (int32_t)step->best[row];
        row++;
    }
    return step->other_count ? OTHERS : FINISHED;
}

/* Compute the slices, of which there are `count`, from stage `first` on: 0 begins the step, others go on with it.
   The stages are computed in one region of as many threads as OpenMP is set to now: all, or until the word
   `watched`, looked at before every stage, no longer holds `seen`; a single one where there is no such word.
   Returns the stage to go on with, above 0. Else the step is at its end: FINISHED, all tokens are in the table;
   OTHERS, but for these; BROKEN, none are; or it did not begin (REFUSED, NO_ROOM). */
EXPORT int64_t semipd_step(const Model *model, Step *step, const Slice *slices, int64_t count, int64_t first,
                           const uint64_t *watched, uint64_t seen) {
    step->slices = slices, step->count = count;
    int64_t not_begun = first ? 0 : begin(model, step);
    if (not_begun) return not_begun;
    const Layer *layers = model->layer;
    int64_t all = model->layers * STAGES, end = step->need.sampled ? all + 1 : all - STAGES + ATTEND;
    int64_t index = first, items = first < all ? cut(model, step, layers[first / STAGES].window) : 0;
    int stop[2]; /* after stages with even and with odd numbers, so that none is set while a thread may read it */
#pragma omp parallel firstprivate(index)
    do {
        int64_t layer = index / STAGES;
        if (index % STAGES == PROJECT && layer && index < all && layers[layer].window != layers[layer - 1].window) {
#pragma omp single
            items = cut(model, step, layers[layer].window);
        }
        stage_in_team(model, step, index++, items);
#pragma omp master
        {
            first = index;
            stop[index % 2] = index == end || !watched || __atomic_load_n(watched, __ATOMIC_RELAXED) != seen;
        }
#pragma omp barrier
    } while (!stop[index % 2]);
    return first < end ? first : finish(step);
}
