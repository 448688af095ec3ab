/* A tar of a directory or a file, made in a child inside the sandbox.
 *
 * Regular files, directories, and symbolic links that stay inside; devices, FIFOs, sockets and links that
 * lead out are left out. Nothing is followed: every step opens one name in a directory that is already open.
 * A file's size is that of the open descriptor; if it shrinks while it is read, zeros take the place.
 * Names that ustar cannot hold get a pax header.
 */
#include "agent.h"
#include "tar.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static struct slot *slot;
static uint64_t left;
static char name[PATH_MAX], target[PATH_MAX];

static void put(const void *bytes, size_t count) {
    if (count > left)
        file_end(slot, E2BIG, "is larger than the caller allows", 0);
    left -= count;
    if (!put_all(1, bytes, count))
        file_end(slot, errno, "was cut off", 0);
}

static void pad(uint64_t size) {
    static const char zeros[TAR_BLOCK];
    put(zeros, (size_t)(-size % TAR_BLOCK));
}

static void octal(char *field, size_t width, uint64_t value) {
    snprintf(field, width, "%0*llo", (int)width - 1, (unsigned long long)value);
}

static void header(const char *entry, char type, mode_t mode, uint64_t size, int64_t time, const char *link) {
    struct tar_header h;
    memset(&h, 0, sizeof h);
    memcpy(h.name, entry, strnlen(entry, sizeof h.name));
    octal(h.mode, sizeof h.mode, mode & 07777);
    octal(h.uid, sizeof h.uid, 0);
    octal(h.gid, sizeof h.gid, 0);
    octal(h.size, sizeof h.size, size > TAR_SIZE_MOST ? 0 : size);
    octal(h.mtime, sizeof h.mtime, time < 0 || time > (int64_t)TAR_SIZE_MOST ? 0 : (uint64_t)time);
    h.type = type;
    memcpy(h.link, link, strnlen(link, sizeof h.link));
    memcpy(h.magic, "ustar\00000", 8);
    memset(h.sum, ' ', sizeof h.sum);
    unsigned sum = 0;
    for (size_t i = 0; i < sizeof h; i++)
        sum += ((unsigned char *)&h)[i];
    snprintf(h.sum, sizeof h.sum, "%06o", sum);
    put(&h, sizeof h);
}

/* "LENGTH key=value\n", where LENGTH counts its own digits. */
static size_t record(char *to, size_t room, const char *key, const char *value) {
    size_t size = strlen(key) + strlen(value) + 3, digits = 1;
    for (size_t total; (total = (size_t)snprintf(NULL, 0, "%zu", size + digits)) != digits;)
        digits = total;
    int wrote = snprintf(to, room, "%zu %s=%s\n", size + digits, key, value);
    return wrote > 0 && (size_t)wrote < room ? (size_t)wrote : 0;
}

static void extended(const char *entry, uint64_t size, const char *link) {
    static char text[2 * PATH_MAX + 128];
    char number[24];
    size_t used_up = 0;
    snprintf(number, sizeof number, "%llu", (unsigned long long)size);
    if (strlen(entry) > sizeof((struct tar_header *)0)->name)
        used_up += record(text, sizeof text, "path", entry);
    if (strlen(link) > sizeof((struct tar_header *)0)->link)
        used_up += record(text + used_up, sizeof text - used_up, "linkpath", link);
    if (size > TAR_SIZE_MOST)
        used_up += record(text + used_up, sizeof text - used_up, "size", number);
    if (!used_up)
        return;
    header("pax", 'x', 0644, used_up, 0, "");
    put(text, used_up);
    pad(used_up);
}

static void entry(char type, const struct stat *info, uint64_t size, const char *link) {
    extended(name, size, link);
    header(name, type, info->st_mode, size, info->st_mtime, link);
}

static void put_file(int fd) {
    static char block[65536];
    struct stat info;
    if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode))
        return;
    uint64_t size = (uint64_t)info.st_size, at = 0;
    if (size > left)
        file_end(slot, E2BIG, "is larger than the caller allows", 0);
    entry('0', &info, size, "");
    while (at < size) {
        size_t most = size - at < sizeof block ? (size_t)(size - at) : sizeof block;
        ssize_t got = read(fd, block, most);
        if (got < 0 && errno == EINTR)
            continue;
        if (got <= 0) {
            memset(block, 0, most);
            got = (ssize_t)most;
        }
        put(block, (size_t)got);
        at += (uint64_t)got;
    }
    pad(size);
}

static void put_link(int directory, const char *last, const struct stat *info) {
    ssize_t size = readlinkat(directory, last, target, sizeof target - 1);
    if (size <= 0 || size >= (ssize_t)sizeof target - 1)
        return;
    target[size] = 0;
    if (tar_link_stays(name, target))
        entry('2', info, 0, target);
}

static void put_directory(int fd, unsigned depth);

static void put_any(int directory, const char *last, unsigned depth) {
    struct stat info;
    if (fstatat(directory, last, &info, AT_SYMLINK_NOFOLLOW) != 0)
        return; /* it went away while we looked */
    if (S_ISLNK(info.st_mode)) {
        put_link(directory, last, &info);
        return;
    }
    if (!S_ISREG(info.st_mode) && !S_ISDIR(info.st_mode))
        return;
    int more = S_ISDIR(info.st_mode) ? O_DIRECTORY : O_NONBLOCK | O_NOCTTY;
    int fd = openat(directory, last, O_RDONLY | O_NOFOLLOW | O_CLOEXEC | more);
    if (fd < 0 && (errno == ENOENT || errno == ELOOP || errno == ENOTDIR))
        return;
    if (fd < 0)
        file_end(slot, errno, "has something in it that cannot be read", 0);
    if (S_ISREG(info.st_mode)) {
        put_file(fd);
        close(fd);
        return;
    }
    size_t length = strlen(name);
    strcpy(name + length, "/");
    entry('5', &info, 0, "");
    put_directory(fd, depth + 1);
    name[length] = 0;
}

/* Takes `fd`; `name` ends with a slash, or is empty at the top. */
static void put_directory(int fd, unsigned depth) {
    DIR *open = depth > TAR_DEPTH_MOST ? NULL : fdopendir(fd);
    if (!open)
        file_end(slot, depth > TAR_DEPTH_MOST ? ELOOP : errno, "has directories nested too deeply", 0);
    size_t length = strlen(name);
    for (struct dirent *one; (one = readdir(open));) {
        if (strcmp(one->d_name, ".") == 0 || strcmp(one->d_name, "..") == 0)
            continue;
        if (length + strlen(one->d_name) + 2 >= sizeof name)
            file_end(slot, ENAMETOOLONG, "has a name in it that is too long", 0);
        strcpy(name + length, one->d_name);
        put_any(fd, one->d_name, depth);
        name[length] = 0;
    }
    closedir(open);
}

/* `path` itself may be a symbolic link: the caller named it. A directory's entries are named relative to it. */
_Noreturn void tar_out(struct slot *result, const char *path, uint64_t limit) {
    static const char end[2 * TAR_BLOCK];
    struct stat info;
    slot = result;
    left = limit;
    if (path[0] != '/')
        file_end(slot, EINVAL, "needs an absolute path", 0);
    if (stat(path, &info) != 0)
        file_end(slot, errno, "cannot read it", 0);
    if (!S_ISDIR(info.st_mode) && !S_ISREG(info.st_mode))
        file_end(slot, EINVAL, "is neither a directory nor a regular file", 0);
    int fd = open(path, O_RDONLY | O_NONBLOCK | O_NOCTTY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &info) != 0)
        file_end(slot, errno, "cannot open it", 0);
    if (S_ISDIR(info.st_mode)) {
        put_directory(fd, 0);
    } else {
        const char *last = strrchr(path, '/') + 1;
        memcpy(name, last, strnlen(last, sizeof name - 1));
        put_file(fd);
    }
    put(end, sizeof end);
    file_end(slot, 0, NULL, limit - left);
}
