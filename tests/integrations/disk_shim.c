/* The disk as it is on a bad day: the N-th call that changes something below a folder fails, or kills the process.
 *
 * Loaded with LD_PRELOAD.  Until shim_arm() is called it only passes on; afterwards it counts the calls of write, writev,
 * ftruncate, fsync, mkdir, rename, renameat, unlink, unlinkat, rmdir and of open for writing whose file lies in the
 * folder.
 *
 *   mode 0  counts
 *   mode 1  kills the process before the N-th call
 *   mode 2  kills it after the N-th call
 *   mode 3  from the N-th call on, whatever would take space fails with ENOSPC; what frees it still works
 *   mode 4  a write of the N-th call writes half, then as mode 3
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static size_t folder_length;
static int mode;
static long at;
static atomic_long calls;
static atomic_int armed;

void shim_arm(const char *path, int new_mode, long new_at) {
    strncpy(folder, path, sizeof folder - 1);
    folder_length = strlen(folder);
    mode = new_mode;
    at = new_at;
    atomic_store(&calls, 0);
    atomic_store(&armed, 1);
}

long shim_calls(void) { return atomic_load(&calls); }

static int below_path(const char *path) {
    return armed && path && strncmp(path, folder, folder_length) == 0;
}

static int below_descriptor(int descriptor) {
    char link[64], path[PATH_MAX];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length <= 0) return 0;
    path[length] = 0;
    return below_path(path);
}

static int below_at(int descriptor, const char *path) {
    return path && path[0] == '/' ? below_path(path) : below_descriptor(descriptor);
}

/* The number of this call, after dying of it if that is due; 0: pass on. */
static long before(int concerned) {
    if (!concerned) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (mode == 1 && number == at) kill(getpid(), SIGKILL), pause();
    return number;
}

static void after(long number) {
    if (mode == 2 && number && number == at) kill(getpid(), SIGKILL), pause();
}

static int full(long number) { return number && mode >= 3 && number >= at; }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define FAIL_IF_FULL(number) \
    if (full(number)) { errno = ENOSPC; return -1; }

ssize_t write(int descriptor, const void *data, size_t length) {
    long number = before(below_descriptor(descriptor));
    if (mode == 4 && number == at && length > 1) return REAL(write)(descriptor, data, length / 2);
    FAIL_IF_FULL(number)
    ssize_t result = REAL(write)(descriptor, data, length);
    after(number);
    return result;
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    long number = before(below_descriptor(descriptor));
    FAIL_IF_FULL(number)
    ssize_t result = REAL(writev)(descriptor, parts, count);
    after(number);
    return result;
}

#define ON_DESCRIPTOR(name, type) \
    int name(int descriptor, type length) { \
        long number = before(below_descriptor(descriptor)); \
        FAIL_IF_FULL(number) \
        int result = REAL(name)(descriptor, length); \
        after(number); \
        return result; \
    }
ON_DESCRIPTOR(ftruncate, off_t)
ON_DESCRIPTOR(ftruncate64, off64_t)

int fsync(int descriptor) {
    long number = before(below_descriptor(descriptor));
    FAIL_IF_FULL(number)
    int result = REAL(fsync)(descriptor);
    after(number);
    return result;
}

int mkdir(const char *path, mode_t permissions) {
    long number = before(below_path(path));
    FAIL_IF_FULL(number)
    int result = REAL(mkdir)(path, permissions);
    after(number);
    return result;
}

int rename(const char *from, const char *to) {
    long number = before(below_path(to));
    FAIL_IF_FULL(number)
    int result = REAL(rename)(from, to);
    after(number);
    return result;
}

int renameat(int from_folder, const char *from, int to_folder, const char *to) {
    long number = before(below_at(to_folder, to));
    FAIL_IF_FULL(number)
    int result = REAL(renameat)(from_folder, from, to_folder, to);
    after(number);
    return result;
}

/* These free space: they can be died of, and work on a full disk. */
int unlink(const char *path) {
    long number = before(below_path(path));
    int result = REAL(unlink)(path);
    after(number);
    return result;
}

int unlinkat(int descriptor, const char *path, int flags) {
    long number = before(below_at(descriptor, path));
    int result = REAL(unlinkat)(descriptor, path, flags);
    after(number);
    return result;
}

int rmdir(const char *path) {
    long number = before(below_path(path));
    int result = REAL(rmdir)(path);
    after(number);
    return result;
}

#define OPENS(name) \
    int name(const char *path, int flags, ...) { \
        mode_t permissions = 0; \
        if (flags & (O_CREAT | O_TMPFILE)) { \
            va_list more; \
            va_start(more, flags); \
            permissions = va_arg(more, mode_t); \
            va_end(more); \
        } \
        long number = before((flags & O_CREAT) && below_path(path)); \
        FAIL_IF_FULL(number) \
        int result = REAL(name)(path, flags, permissions); \
        after(number); \
        return result; \
    }
OPENS(open)
OPENS(open64)
