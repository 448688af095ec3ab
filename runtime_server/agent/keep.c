/* Kept output: the head and the tail of a stream in bounded memory, however much is written. */
#include "agent.h"

#include <stdlib.h>
#include <string.h>

#define ALWAYS 16384 /* bytes that every stream may have, also when memory is short */

/* Doubles up to cap. No stream takes more than half of what is left, so that there is some for the next;
 * one that gets no more keeps less instead of failing. */
static void grow(struct keep *k, uint64_t wanted) {
    size_t size = k->size ? k->size : 4096;
    while (size < wanted && size < k->cap)
        size *= 2;
    if (size > k->cap)
        size = k->cap;
    int64_t more = (int64_t)(size - k->size);
    if (size > ALWAYS && more > self.memory_left / 2) {
        size = k->size < ALWAYS ? ALWAYS : k->size;
        more = (int64_t)(size - k->size);
        k->cap = size;
        k->head = size / 2;
    }
    if (!more)
        return;
    unsigned char *data = realloc(k->data, size);
    if (!data) {
        k->cap = k->size;
        k->head = k->cap / 2;
        return;
    }
    self.memory_left -= more;
    k->data = data;
    k->size = size;
}

static void add_to_ring(struct keep *k, const unsigned char *bytes, size_t count) {
    size_t ring = k->cap - k->head;
    if (ring == 0)
        return;
    if (count > ring) {
        k->total += count - ring; /* these would be overwritten by the rest */
        bytes += count - ring;
        count = ring;
    }
    size_t at = (size_t)((k->total - k->head) % ring);
    size_t first = count < ring - at ? count : ring - at;
    memcpy(k->data + k->head + at, bytes, first);
    memcpy(k->data + k->head, bytes + first, count - first);
}

void keep_add(struct keep *k, const unsigned char *bytes, size_t count) {
    uint64_t total = k->total + count;
    if (k->size < k->cap && total > k->size)
        grow(k, total);
    if (k->total < k->cap) {
        size_t part = k->cap - (size_t)k->total;
        part = part < count ? part : count;
        memcpy(k->data + k->total, bytes, part);
        k->total += part;
        bytes += part;
        count -= part;
    }
    if (count)
        add_to_ring(k, bytes, count);
    k->total = total;
}

size_t keep_count(const struct keep *k) {
    return k->total < k->cap ? (size_t)k->total : k->cap;
}

static size_t least(size_t a, size_t b) {
    return a < b ? a : b;
}

/* Up to `count` kept bytes from logical position `from`, in the order they were written. */
size_t keep_copy(const struct keep *k, uint64_t from, unsigned char *to, size_t count) {
    size_t at = (size_t)from, part = keep_count(k) - at;
    if (k->total > k->cap && at < k->head) {
        part = k->head - at;
    } else if (k->total > k->cap) {
        size_t ring = k->cap - k->head;
        size_t oldest = (size_t)((k->total - k->head) % ring);
        size_t place = (at - k->head + oldest) % ring;
        part = least(part, ring - place);
        at = k->head + place;
    }
    part = least(part, count);
    memcpy(to, k->data + at, part);
    return part;
}

/* The first offset from `offset` on that is kept. */
uint64_t keep_next(const struct keep *k, uint64_t offset) {
    uint64_t tail = k->total > k->cap ? k->total - (k->cap - k->head) : 0;
    return offset < tail && offset >= k->head ? tail : offset;
}

/* Up to `count` bytes from stream offset `offset`, which keep_next gave; as far as they hang together. */
size_t keep_copy_at(const struct keep *k, uint64_t offset, unsigned char *to, size_t count) {
    uint64_t tail = k->total > k->cap ? k->total - (k->cap - k->head) : 0;
    return keep_copy(k, offset >= tail && tail ? k->head + (offset - tail) : offset, to, count);
}

/* What `from` holds goes to the front of `to`, which is empty. */
void keep_move(struct keep *to, struct keep *from) {
    unsigned char bytes[1024];
    for (size_t at = 0, count; at < keep_count(from); at += count) {
        count = keep_copy(from, at, bytes, sizeof bytes);
        keep_add(to, bytes, count);
    }
    keep_free(from);
}

void keep_free(struct keep *k) {
    self.memory_left += (int64_t)k->size;
    free(k->data);
    *k = (struct keep){0};
}
