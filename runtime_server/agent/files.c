/* Reading and writing files, byte for byte, in a child: a slow or hostile file system stalls only itself.
 *
 * Writing is atomic: a temporary file beside the target, then rename; a reader sees the old bytes or the
 * new ones. Reading refuses whatever is no regular file before opening it, so no FIFO can hold us.
 */
#include "agent.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define BLOCK (64 * 1024)
#define TEMPORARY "/.orchestrate-XXXXXX"

_Noreturn void file_end(struct slot *slot, int error, const char *what, uint64_t value) {
    slot->error = error;
    slot->what = what;
    slot->value = value;
    atomic_store(&slot->done, 1);
    _exit(0);
}

bool put_all(int fd, const void *from, size_t count) {
    const char *bytes = from;
    while (count) {
        ssize_t put = write(fd, bytes, count);
        if (put < 0 && errno == EINTR)
            continue;
        if (put < 0)
            return false;
        bytes += put;
        count -= (size_t)put;
    }
    return true;
}

static void make_parents(char *path) {
    for (char *slash = strchr(path + 1, '/'); slash; slash = strchr(slash + 1, '/')) {
        *slash = 0;
        mkdir(path, 0755); /* what is really missing shows when the file is opened */
        *slash = '/';
    }
}

void make_directory(char *path) {
    make_parents(path);
    mkdir(path, 0755);
}

/* The file behind `path`, symbolic links followed, so that a link stays a link. */
static const char *resolve(struct slot *slot, const char *path, char *buffer) {
    struct stat info;
    size_t length = strlen(path);
    if (path[0] != '/' || length + sizeof TEMPORARY > PATH_MAX)
        file_end(slot, length + sizeof TEMPORARY > PATH_MAX ? ENAMETOOLONG : EINVAL, "needs an absolute path", 0);
    if (path[length - 1] == '/')
        file_end(slot, EISDIR, "names a directory", 0);
    if (lstat(path, &info) != 0)
        return path;
    if (S_ISLNK(info.st_mode)) {
        if (!realpath(path, buffer) || stat(buffer, &info) != 0)
            file_end(slot, errno, "cannot follow the symbolic link", 0);
        path = buffer;
    }
    if (S_ISDIR(info.st_mode))
        file_end(slot, EISDIR, "is a directory", 0);
    if (!S_ISREG(info.st_mode))
        file_end(slot, EINVAL, "is not a regular file", 0);
    return path;
}

/* Copies standard input; the temporary file goes away unless every byte arrived. */
static int fill(int fd, uint64_t size) {
    static char block[BLOCK];
    for (uint64_t left = size; left;) {
        ssize_t got = read(0, block, left < BLOCK ? (size_t)left : BLOCK);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            return got < 0 ? errno : ECANCELED;
        if (!put_all(fd, block, (size_t)got))
            return errno;
        left -= (uint64_t)got;
    }
    return 0;
}

_Noreturn void file_write(struct slot *slot, const char *path, mode_t mode, bool parents, uint64_t size) {
    static char target[PATH_MAX], temporary[PATH_MAX], real[PATH_MAX];
    strcpy(target, resolve(slot, path, real));
    if (parents)
        make_parents(target);
    strcpy(temporary, target);
    strcpy(strrchr(temporary, '/'), TEMPORARY);
    int fd = mkostemp(temporary, O_CLOEXEC);
    if (fd < 0)
        file_end(slot, errno, "cannot create a file there", 0);
    int error = fill(fd, size);
    if (!error && (fchmod(fd, mode & 07777) != 0 || close(fd) != 0))
        error = errno;
    if (!error && rename(temporary, target) == 0)
        file_end(slot, 0, NULL, size);
    error = error ? error : errno;
    unlink(temporary);
    file_end(slot, error, "cannot write the file", 0);
}

static void must_be_regular(struct slot *slot, const struct stat *info) {
    if (S_ISDIR(info->st_mode))
        file_end(slot, EISDIR, "is a directory", 0);
    if (!S_ISREG(info->st_mode))
        file_end(slot, EINVAL, "is not a regular file", 0);
}

_Noreturn void file_read(struct slot *slot, const char *path, uint64_t limit) {
    static char block[BLOCK];
    struct stat info;
    if (path[0] != '/')
        file_end(slot, EINVAL, "needs an absolute path", 0);
    if (stat(path, &info) != 0)
        file_end(slot, errno, "cannot read the file", 0);
    must_be_regular(slot, &info); /* before opening: opening a device may already do something */
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0)
        file_end(slot, errno, "cannot open the file", 0);
    must_be_regular(slot, &info);
    uint64_t total = 0;
    if (info.st_size > 0 && (uint64_t)info.st_size > limit)
        file_end(slot, E2BIG, "is larger than the caller allows", (uint64_t)info.st_size);
    for (;;) {
        ssize_t got = read(fd, block, sizeof block);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            file_end(slot, errno, "cannot read the file", 0);
        total += (uint64_t)got;
        if (total > limit)
            file_end(slot, E2BIG, "is larger than the caller allows", total);
        if (got == 0)
            file_end(slot, 0, NULL, total);
        if (!put_all(1, block, (size_t)got))
            file_end(slot, errno, "was cut off", 0);
    }
}
