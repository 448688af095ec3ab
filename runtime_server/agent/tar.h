/* What tarout.c and tarin.c share: the header of a tar entry, and which links stay inside. */
#ifndef TAR_H
#define TAR_H

#include <stdbool.h>
#include <string.h>

#define TAR_BLOCK 512u
#define TAR_SIZE_MOST 077777777777ull /* what eleven octal digits hold */
#define TAR_DEPTH_MOST 200u

struct tar_header {
    char name[100], mode[8], uid[8], gid[8], size[12], mtime[12], sum[8], type, link[100];
    char magic[8], user[32], group[32], major[8], minor[8], prefix[155], rest[12];
};

/* Whether a link called `name` that points to `target` cannot lead out of the directory that names are
 * relative to: no more leading ".." than directories above it, and none further on, where another link
 * may stand before it. Every link of an archive being such, none leads out through another. */
static inline bool tar_link_stays(const char *name, const char *target) {
    int depth = 0;
    for (const char *at = name; (at = strchr(at, '/')); at++)
        depth += at[1] != 0;
    bool leading = true;
    if (target[0] == '/' || target[0] == 0)
        return false;
    for (const char *at = target; *at;) {
        size_t size = strcspn(at, "/");
        bool up = size == 2 && memcmp(at, "..", 2) == 0;
        if (up && (!leading || --depth < 0))
            return false;
        leading &= up || size == 0 || (size == 1 && *at == '.');
        at += size + (at[size] == '/');
    }
    return true;
}

#endif
