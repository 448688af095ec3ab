/* Kept output: the head and the tail of a stream in bounded memory, however much is written. */
#include "agent.h"

#include <stdlib.h>
#include <string.h>

/* Doubles up to cap. When memory is short the stream keeps less instead of failing. */
static void grow(struct keep *k, uint64_t wanted) {
    size_t size = k->size ? k->size : 4096;
    while (size < wanted && size < k->cap)
        size *= 2;
    if (size > k->cap)
        size = k->cap;
    unsigned char *data = size - k->size <= self.memory_left ? realloc(k->data, size) : NULL;
    if (!data) {
        k->cap = k->size;
        k->head = k->cap / 2;
        return;
    }
    self.memory_left -= size - k->size;
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

void keep_free(struct keep *k) {
    self.memory_left += k->size;
    free(k->data);
    *k = (struct keep){0};
}
