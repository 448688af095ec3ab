/* Unpacks whatever the fuzzer makes up, with the real reader of archives, into a directory of its own.
 *
 * Beside crashes it looks for the one thing that must never happen: something outside of that directory.
 * Built and run by `python -m fuzz`, after the frames.
 */
#include "agent.h"

#include <fcntl.h>
#include <ftw.h>
#include <setjmp.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "tarin.c"

static jmp_buf over;
static char place[] = "/tmp/fuzz-tar-XXXXXX", inside[64];

_Noreturn void file_end(struct slot *s, int error, const char *what, uint64_t value) {
    (void)s, (void)error, (void)what, (void)value;
    longjmp(over, 1);
}

bool put_all(int fd, const void *from, size_t count) {
    return write(fd, from, count) == (ssize_t)count;
}

void make_directory(char *path) {
    mkdir(path, 0755);
}

static int drop(const char *path, const struct stat *info, int type, struct FTW *walk) {
    (void)info, (void)type;
    return walk->level ? remove(path) : 0;
}

static int outside(const char *path, const struct stat *info, int type, struct FTW *walk) {
    (void)info, (void)type;
    if (walk->level == 1 && strcmp(path, inside) != 0)
        abort(); /* it was not unpacked where it should be */
    return 0;
}

/* The fuzzer would not find a right checksum. */
static void sign(struct tar_header *h) {
    static const struct tar_header zeros;
    unsigned sum = 8 * ' ';
    memset(h->sum, 0, sizeof h->sum);
    if (memcmp(h, &zeros, sizeof zeros) == 0)
        return;
    for (size_t i = 0; i < sizeof *h; i++)
        sum += ((unsigned char *)h)[i];
    snprintf(h->sum, sizeof h->sum, "%06o", sum);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static struct slot result;
    if (!inside[0]) {
        if (!mkdtemp(place))
            abort();
        snprintf(inside, sizeof inside, "%s/in", place);
    }
    static uint8_t archive[16384];
    size = size < sizeof archive ? size : sizeof archive;
    memcpy(archive, data, size);
    for (size_t at = 0; at + TAR_BLOCK <= size; at += TAR_BLOCK)
        sign((struct tar_header *)(void *)(archive + at));
    int first = fcntl(2, F_DUPFD, 3);
    close(first); /* what is opened from here on has at least this number */
    int file = memfd_create("input", MFD_CLOEXEC);
    if (file < 0 || write(file, archive, size) != (ssize_t)size || lseek(file, 0, SEEK_SET) != 0)
        abort();
    dup2(file, 0);
    close(file);
    made = 0;
    if (!setjmp(over))
        tar_in(&result, inside, 1 << 20, 20);
    closefrom(first);
    nftw(place, outside, 8, FTW_PHYS);
    nftw(inside, drop, 8, FTW_PHYS | FTW_DEPTH);
    return 0;
}
