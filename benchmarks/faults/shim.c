/* Preloaded: lets the n-th file-system call below one directory fail once, come short, or meet a signal.
 *
 * fault_arm(root, at, kind, log) begins to count: kind < 0 is -errno, 0 only counts, SHORT halves a read or write, and
 * 1000 + n sends signal n before the call. log is a descriptor that gets a line for each call, or -1. What a failing
 * call leaves behind is what the system would leave: a failed close has closed.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { SHORT = 1, SIGNALS = 1000 };

static char root[PATH_MAX];
static size_t root_length;
static atomic_long calls;
static long at;
static int kind, log_fd = -1;
static atomic_int armed;

void fault_arm(const char *directory, long number, int what, int log) {
    strncpy(root, directory, sizeof root - 1);
    root_length = strlen(root);
    at = number;
    kind = what;
    log_fd = log;
    atomic_store(&calls, 0);
    atomic_store(&armed, 1);
}

void fault_disarm(void) { atomic_store(&armed, 0); }

long fault_calls(void) { return atomic_load(&calls); }

static int link_of(const char *link, char *out) {
    long got = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1);
    out[got < 0 ? 0 : got] = 0;
    return got > 0;
}

static int of_fd(int fd, char *out) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return link_of(link, out);
}

/* 1 when this call is the one, and has to fail (errno is set), or with SHORT to be cut. */
static int due(const char *call, int fd, const char *path, int cuttable) {
    if (!atomic_load(&armed)) return 0;
    int saved = errno;
    char place[2 * PATH_MAX + 2] = "";
    if (path && path[0] == '/') {
        strncpy(place, path, PATH_MAX);
    } else {
        if (fd == AT_FDCWD) link_of("/proc/self/cwd", place);
        else of_fd(fd, place);
        if (path) {
            strcat(place, "/");
            strncat(place, path, PATH_MAX);
        }
    }
    errno = saved;
    if (strncmp(place, root, root_length) != 0) return 0;
    long number = atomic_fetch_add(&calls, 1) + 1;
    if (log_fd >= 0) {
        char line[2 * PATH_MAX + 64];
        int length = snprintf(line, sizeof line, "%ld %s %s\n", number, call, place + root_length);
        syscall(SYS_write, log_fd, line, (size_t)length);
        errno = saved;
    }
    if (number != at || !kind) return 0;
    if (kind >= SIGNALS) {
        syscall(SYS_kill, getpid(), kind - SIGNALS);
        errno = saved;
        return 0;
    }
    if (kind == SHORT) return cuttable;
    errno = -kind;
    return 1;
}

#define PATH_CALL(name, type, failed, parameters, fd, path, arguments) \
    type name parameters { \
        type(*real) parameters = (type(*) parameters)dlsym(RTLD_NEXT, #name); \
        if (due(#name, fd, path, 0)) return failed; \
        return real arguments; \
    }

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        int(*real)(const char *, int, ...) = (int (*)(const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (due(#name, AT_FDCWD, path, 0)) return -1; \
        return real(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int fd, const char *path, int flags, ...) { \
        int(*real)(int, const char *, int, ...) = (int (*)(int, const char *, int, ...))dlsym(RTLD_NEXT, #name); \
        va_list rest; \
        va_start(rest, flags); \
        mode_t mode = va_arg(rest, mode_t); \
        va_end(rest); \
        if (due(#name, fd, path, 0)) return -1; \
        return real(fd, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)
PATH_CALL(fopen, FILE *, NULL, (const char *path, const char *mode), AT_FDCWD, path, (path, mode))
PATH_CALL(fopen64, FILE *, NULL, (const char *path, const char *mode), AT_FDCWD, path, (path, mode))

/* Reads and writes: the whole length, or half of it where they are to come short. */
#define MOVE(name, parameters, fd, count, arguments, halved) \
    ssize_t name parameters { \
        ssize_t(*real) parameters = (ssize_t(*) parameters)dlsym(RTLD_NEXT, #name); \
        if (due(#name, fd, NULL, (count) > 1)) { \
            if (kind != SHORT) return -1; \
            return real halved; \
        } \
        return real arguments; \
    }
MOVE(read, (int fd, void *data, size_t n), fd, n, (fd, data, n), (fd, data, n / 2))
MOVE(write, (int fd, const void *data, size_t n), fd, n, (fd, data, n), (fd, data, n / 2))
MOVE(pread, (int fd, void *data, size_t n, off_t o), fd, n, (fd, data, n, o), (fd, data, n / 2, o))
MOVE(pread64, (int fd, void *data, size_t n, off64_t o), fd, n, (fd, data, n, o), (fd, data, n / 2, o))
MOVE(pwrite, (int fd, const void *data, size_t n, off_t o), fd, n, (fd, data, n, o), (fd, data, n / 2, o))
MOVE(pwrite64, (int fd, const void *data, size_t n, off64_t o), fd, n, (fd, data, n, o), (fd, data, n / 2, o))
MOVE(sendfile64, (int out, int in, off64_t *o, size_t n), out, n, (out, in, o, n), (out, in, o, n / 2))
MOVE(copy_file_range, (int in, off64_t *i, int out, off64_t *o, size_t n, unsigned flags), out, n,
     (in, i, out, o, n, flags), (in, i, out, o, n / 2, flags))

static struct iovec half_of(const struct iovec *all) {
    struct iovec half = all[0];
    half.iov_len = half.iov_len > 1 ? half.iov_len / 2 : half.iov_len;
    return half;
}
#define VECTOR(name, parameters, arguments, first) \
    ssize_t name parameters { \
        ssize_t(*real) parameters = (ssize_t(*) parameters)dlsym(RTLD_NEXT, #name); \
        if (due(#name, fd, NULL, n > 0)) { \
            if (kind != SHORT) return -1; \
            struct iovec half = half_of(v); \
            return real first; \
        } \
        return real arguments; \
    }
VECTOR(readv, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, &half, 1))
VECTOR(writev, (int fd, const struct iovec *v, int n), (fd, v, n), (fd, &half, 1))
VECTOR(preadv64v2, (int fd, const struct iovec *v, int n, off64_t o, int flags), (fd, v, n, o, flags),
       (fd, &half, 1, o, flags))
VECTOR(pwritev64v2, (int fd, const struct iovec *v, int n, off64_t o, int flags), (fd, v, n, o, flags),
       (fd, &half, 1, o, flags))

#define FD_CALL(name, type, failed, parameters, arguments) PATH_CALL(name, type, failed, parameters, fd, NULL, arguments)
FD_CALL(fsync, int, -1, (int fd), (fd))
FD_CALL(fdatasync, int, -1, (int fd), (fd))
FD_CALL(ftruncate, int, -1, (int fd, off_t size), (fd, size))
FD_CALL(ftruncate64, int, -1, (int fd, off64_t size), (fd, size))
FD_CALL(flock, int, -1, (int fd, int what), (fd, what))
FD_CALL(fchmod, int, -1, (int fd, mode_t mode), (fd, mode))
FD_CALL(fstat, int, -1, (int fd, struct stat *out), (fd, out))
FD_CALL(fstat64, int, -1, (int fd, struct stat64 *out), (fd, out))
FD_CALL(fstatvfs, int, -1, (int fd, struct statvfs *out), (fd, out))
FD_CALL(fstatvfs64, int, -1, (int fd, struct statvfs64 *out), (fd, out))
FD_CALL(fdopendir, DIR *, NULL, (int fd), (fd))
FD_CALL(posix_fadvise, int, errno, (int fd, off_t o, off_t n, int what), (fd, o, n, what))
FD_CALL(posix_fadvise64, int, errno, (int fd, off64_t o, off64_t n, int what), (fd, o, n, what))
FD_CALL(posix_fallocate, int, errno, (int fd, off_t o, off_t n), (fd, o, n))
FD_CALL(posix_fallocate64, int, errno, (int fd, off64_t o, off64_t n), (fd, o, n))

int close(int fd) {
    int (*real)(int) = (int (*)(int))dlsym(RTLD_NEXT, "close");
    if (due("close", fd, NULL, 0)) {
        int said = errno;
        real(fd);
        errno = said;
        return -1;
    }
    return real(fd);
}

struct dirent64 *readdir64(DIR *directory) {
    struct dirent64 *(*real)(DIR *) = (struct dirent64 * (*)(DIR *)) dlsym(RTLD_NEXT, "readdir64");
    return due("readdir64", dirfd(directory), NULL, 0) ? NULL : real(directory);
}

#define ONE(name, more, arguments) PATH_CALL(name, int, -1, more, AT_FDCWD, path, arguments)
ONE(mkdir, (const char *path, mode_t mode), (path, mode))
ONE(rmdir, (const char *path), (path))
ONE(unlink, (const char *path), (path))
ONE(chmod, (const char *path, mode_t mode), (path, mode))
ONE(access, (const char *path, int mode), (path, mode))
ONE(truncate64, (const char *path, off64_t size), (path, size))
ONE(stat, (const char *path, struct stat *out), (path, out))
ONE(stat64, (const char *path, struct stat64 *out), (path, out))
ONE(lstat, (const char *path, struct stat *out), (path, out))
ONE(lstat64, (const char *path, struct stat64 *out), (path, out))
ONE(statvfs, (const char *path, struct statvfs *out), (path, out))
ONE(statvfs64, (const char *path, struct statvfs64 *out), (path, out))
PATH_CALL(opendir, DIR *, NULL, (const char *path), AT_FDCWD, path, (path))
PATH_CALL(rename, int, -1, (const char *from, const char *to), AT_FDCWD, to, (from, to))
PATH_CALL(symlink, int, -1, (const char *to, const char *path), AT_FDCWD, path, (to, path))
PATH_CALL(link, int, -1, (const char *from, const char *path), AT_FDCWD, path, (from, path))
PATH_CALL(readlink, ssize_t, -1, (const char *path, char *out, size_t n), AT_FDCWD, path, (path, out, n))

#define AT(name, type, more, arguments) PATH_CALL(name, type, -1, more, fd, path, arguments)
AT(mkdirat, int, (int fd, const char *path, mode_t mode), (fd, path, mode))
AT(unlinkat, int, (int fd, const char *path, int flags), (fd, path, flags))
AT(fstatat, int, (int fd, const char *path, struct stat *out, int flags), (fd, path, out, flags))
AT(fstatat64, int, (int fd, const char *path, struct stat64 *out, int flags), (fd, path, out, flags))
AT(faccessat, int, (int fd, const char *path, int mode, int flags), (fd, path, mode, flags))
AT(fchmodat, int, (int fd, const char *path, mode_t mode, int flags), (fd, path, mode, flags))
AT(utimensat, int, (int fd, const char *path, const struct timespec times[2], int flags), (fd, path, times, flags))
AT(readlinkat, ssize_t, (int fd, const char *path, char *out, size_t n), (fd, path, out, n))
PATH_CALL(symlinkat, int, -1, (const char *to, int fd, const char *path), fd, path, (to, fd, path))
PATH_CALL(linkat, int, -1, (int one, const char *from, int fd, const char *path, int flags), fd, path,
          (one, from, fd, path, flags))
PATH_CALL(renameat, int, -1, (int one, const char *from, int fd, const char *path), fd, path, (one, from, fd, path))
PATH_CALL(renameat2, int, -1, (int one, const char *from, int fd, const char *path, unsigned flags), fd, path,
          (one, from, fd, path, flags))
