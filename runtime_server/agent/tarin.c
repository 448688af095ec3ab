/* Unpacking a tar into a directory, in a child inside the sandbox, from standard input.
 *
 * Regular files, directories, hard links and symbolic links that stay inside; anything else, absolute names
 * and ".." end it with an error. Nothing is written through a symbolic link, whoever made it: every
 * directory on the way is opened by itself, and a file is always a new one. Bounded are the bytes of the
 * stream and the number of entries. No owners, no set-id bits. What was unpacked before an error stays.
 * Knows ustar, pax and GNU long names; not sparse files.
 */
#include "agent.h"
#include "tar.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct slot *slot;
static uint64_t left, entries_left, made;
static int top;

struct next {
    char name[PATH_MAX], link[PATH_MAX];
    bool has_name, has_link, has_size;
    uint64_t size;
};

static _Noreturn void refuse(int error, const char *what) {
    file_end(slot, error, what, made);
}

static void take(void *to, size_t count) {
    if (count > left)
        refuse(E2BIG, "the archive has more bytes than the caller allows");
    left -= count;
    for (char *at = to; count;) {
        ssize_t got = read(0, at, count);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0)
            refuse(got < 0 ? errno : EINVAL, "the archive is cut off");
        at += got;
        count -= (size_t)got;
    }
}

static uint64_t number(const char *field, size_t width) {
    uint64_t value = 0;
    if ((unsigned char)field[0] == 0x80) { /* base 256, for what octal digits cannot hold */
        for (size_t i = width - 8; i < width; i++)
            value = value << 8 | (unsigned char)field[i];
        return value;
    }
    for (size_t i = 0; i < width && field[i]; i++)
        if (field[i] >= '0' && field[i] <= '7')
            value = value << 3 | (uint64_t)(field[i] - '0');
        else if (field[i] != ' ')
            refuse(EINVAL, "the archive has a number that is none");
    return value;
}

/* False at the end of the archive: a block of zeros. */
static bool take_header(struct tar_header *h) {
    static const struct tar_header zeros;
    take(h, sizeof *h);
    if (memcmp(h, &zeros, sizeof zeros) == 0)
        return false;
    unsigned sum = 8 * ' ';
    for (size_t i = 0; i < sizeof *h; i++)
        sum += ((unsigned char *)h)[i];
    for (size_t i = 0; i < sizeof h->sum; i++)
        sum -= (unsigned char)h->sum[i];
    if (number(h->sum, sizeof h->sum) != sum)
        refuse(EINVAL, "this is no tar archive, or a damaged one (compressed? unpack it first)");
    return true;
}

/* ---- names ------------------------------------------------------------------------------------------ */

/* No "..", nothing absolute; "." and double slashes go away. Empty for the top itself. */
static void clean(char *path) {
    char *to = path;
    if (path[0] == '/')
        refuse(EPERM, "the archive has an absolute name");
    for (const char *at = path; *at;) {
        size_t size = strcspn(at, "/");
        if (size == 2 && memcmp(at, "..", 2) == 0)
            refuse(EPERM, "the archive has a name with ..");
        if (size && !(size == 1 && *at == '.')) {
            if (to != path)
                *to++ = '/';
            memmove(to, at, size);
            to += size;
        }
        at += size + (at[size] == '/');
    }
    *to = 0;
}

/* The open directory that `path` is in, and in `*last` its name there. Missing ones are made if `make`. */
static int parent_of(char *path, char **last, bool make) {
    int at = fcntl(top, F_DUPFD_CLOEXEC, 3);
    *last = path;
    for (char *slash; at >= 0 && (slash = strchr(*last, '/')); *last = slash + 1) {
        *slash = 0;
        if (make)
            mkdirat(at, *last, 0755);
        int below = openat(at, *last, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
        int error = errno;
        *slash = '/';
        close(at);
        at = below;
        errno = error;
    }
    if (at < 0)
        refuse(errno, "a name in the archive leads through something that is no directory, or a link");
    return at;
}

/* ---- entries ---------------------------------------------------------------------------------------- */

static void skip_padding(uint64_t size) {
    char rest[TAR_BLOCK];
    take(rest, (size_t)(-size % TAR_BLOCK));
}

static void make_file(int directory, const char *last, const struct tar_header *h, uint64_t size) {
    static char block[65536];
    if (size > left)
        refuse(E2BIG, "the archive has more bytes than the caller allows");
    unlinkat(directory, last, 0); /* never into what is there: it may be a link to elsewhere */
    int fd = openat(directory, last, O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600);
    if (fd < 0)
        refuse(errno, "cannot create a file of the archive");
    for (uint64_t rest = size; rest;) {
        size_t part = rest < sizeof block ? (size_t)rest : sizeof block;
        take(block, part);
        if (!put_all(fd, block, part))
            refuse(errno, "cannot write a file of the archive");
        rest -= part;
    }
    skip_padding(size);
    struct timespec times[2] = {{.tv_nsec = UTIME_NOW}, {.tv_sec = (time_t)number(h->mtime, sizeof h->mtime)}};
    futimens(fd, times);
    if (fchmod(fd, number(h->mode, sizeof h->mode) & 0777) != 0 || close(fd) != 0)
        refuse(errno, "cannot write a file of the archive");
}

static void make_folder(int directory, const char *last, const struct tar_header *h) {
    mode_t mode = (number(h->mode, sizeof h->mode) & 0777) | 0700;
    struct stat info;
    if (mkdirat(directory, last, mode) == 0 || errno != EEXIST)
        return; /* what is really wrong shows when something is put there */
    if (fstatat(directory, last, &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISDIR(info.st_mode))
        refuse(ENOTDIR, "the archive has a directory where there is something else");
}

static void make_symlink(int directory, const char *last, const char *path, const char *target) {
    if (!tar_link_stays(path, target))
        refuse(EPERM, "the archive has a symbolic link that leads out of it");
    unlinkat(directory, last, 0);
    if (symlinkat(target, directory, last) != 0)
        refuse(errno, "cannot create a link of the archive");
}

static void make_hard_link(int directory, const char *last, char *target) {
    char *name;
    struct stat info;
    clean(target);
    int from = parent_of(target, &name, false);
    if (fstatat(from, name, &info, AT_SYMLINK_NOFOLLOW) != 0 || !S_ISREG(info.st_mode))
        refuse(EPERM, "the archive has a hard link to what is no file of it");
    struct stat there;
    bool same = fstatat(directory, last, &there, AT_SYMLINK_NOFOLLOW) == 0 && there.st_ino == info.st_ino &&
                there.st_dev == info.st_dev;
    if (!same)
        unlinkat(directory, last, 0);
    if (!same && linkat(from, name, directory, last, 0) != 0)
        refuse(errno, "cannot create a link of the archive");
    close(from);
}

static void make(const struct tar_header *h, struct next *n, uint64_t size) {
    char *last;
    clean(n->name);
    bool plain = h->type == '0' || h->type == 0 || h->type == '7';
    if (!plain && size)
        refuse(EINVAL, "the archive has bytes where none belong");
    if (!plain && h->type != '1' && h->type != '2' && h->type != '5')
        refuse(EPERM, "the archive has a device, a FIFO, or something else that is no file, directory or link");
    if (!n->name[0] && h->type != '5')
        refuse(EINVAL, "the archive has an entry without a name");
    if (!n->name[0])
        return; /* the top itself is there */
    int directory = parent_of(n->name, &last, true);
    if (plain)
        make_file(directory, last, h, size);
    else if (h->type == '5')
        make_folder(directory, last, h);
    else if (h->type == '2')
        make_symlink(directory, last, n->name, n->link);
    else
        make_hard_link(directory, last, n->link);
    close(directory);
    made++;
}

/* ---- what stands before an entry -------------------------------------------------------------------- */

static void take_text(char *to, size_t room, uint64_t size) {
    if (size >= room)
        refuse(ENAMETOOLONG, "the archive has a name that is too long");
    take(to, (size_t)size);
    to[size] = 0;
    skip_padding(size);
}

static void keep_text(char to[PATH_MAX], bool *has, const char *value) {
    if (strlen(value) >= PATH_MAX)
        refuse(ENAMETOOLONG, "the archive has a name that is too long");
    strcpy(to, value);
    *has = true;
}

static void understand(struct next *n, char *text, size_t size) {
    for (char *at = text; at < text + size;) {
        char *rest;
        unsigned long length = strtoul(at, &rest, 10);
        if (*rest != ' ' || length < (size_t)(rest - at) + 3 || length > (size_t)(text + size - at) ||
            at[length - 1] != '\n')
            refuse(EINVAL, "the archive has a damaged pax header");
        at[length - 1] = 0;
        char *key = rest + 1, *value = strchr(key, '=');
        if (!value)
            refuse(EINVAL, "the archive has a damaged pax header");
        *value++ = 0;
        if (strlen(value) != (size_t)(at + length - 1 - value))
            refuse(EINVAL, "the archive has a name with a NUL");
        if (strcmp(key, "path") == 0)
            keep_text(n->name, &n->has_name, value);
        else if (strcmp(key, "linkpath") == 0)
            keep_text(n->link, &n->has_link, value);
        else if (strcmp(key, "size") == 0)
            n->size = strtoull(value, NULL, 10), n->has_size = true;
        else if (strncmp(key, "GNU.sparse", 10) == 0)
            refuse(EPERM, "the archive has sparse files: make it without");
        at += length;
    }
}

/* True when `h` only said something about the entry that follows. */
static bool describes(const struct tar_header *h, struct next *n) {
    static char text[65536];
    uint64_t size = number(h->size, sizeof h->size);
    if (h->type == 'L' || h->type == 'K') {
        take_text(h->type == 'L' ? n->name : n->link, PATH_MAX, size);
        *(h->type == 'L' ? &n->has_name : &n->has_link) = true;
        return true;
    }
    if (h->type != 'x' && h->type != 'g')
        return false;
    take_text(text, sizeof text, size);
    if (h->type == 'x')
        understand(n, text, (size_t)size);
    return true;
}

static void from_header(const struct tar_header *h, struct next *n) {
    bool split = memcmp(h->magic, "ustar\0", 6) == 0 && h->prefix[0];
    if (!n->has_name)
        snprintf(n->name, sizeof n->name, "%.155s%s%.100s", split ? h->prefix : "", split ? "/" : "", h->name);
    if (!n->has_link)
        snprintf(n->link, sizeof n->link, "%.100s", h->link);
}

static void open_top(char *path) {
    if (path[0] != '/')
        refuse(EINVAL, "needs an absolute path");
    make_directory(path);
    top = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (top < 0)
        refuse(errno, "cannot open the directory to unpack into");
}

_Noreturn void tar_in(struct slot *result, char *path, uint64_t limit, uint64_t entries) {
    static struct tar_header h;
    static struct next n;
    n = (struct next){0};
    slot = result;
    left = limit;
    entries_left = entries;
    open_top(path);
    while (take_header(&h)) {
        if (describes(&h, &n))
            continue;
        if (entries_left-- == 0)
            refuse(E2BIG, "the archive has more entries than the caller allows");
        from_header(&h, &n);
        make(&h, &n, n.has_size ? n.size : number(h.size, sizeof h.size));
        n = (struct next){0};
    }
    static char rest[65536];
    while (read(0, rest, sizeof rest) > 0)
        continue; /* padding after the end; the sender may write it all */
    file_end(slot, 0, NULL, made);
}
