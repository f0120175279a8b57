// shim.c - a library that stands between a program and the files below one folder, to make trouble there.
//
//   cc -shared -fPIC -o shim.so shim.c -ldl && TORTURE_OUT=out TORTURE_KILL=17 LD_PRELOAD=./shim.so ./train_gpt2 ... --out out
//
// It counts the calls that touch the folder TORTURE_OUT, a name as the program says it, or something in it. Its
// settings are environment variables; n counts calls from 1:
//   TORTURE_KILL=n    SIGKILL just before call n;  TORTURE_TORN=n  in the middle of it, if it writes
//   TORTURE_FAIL=n    call n fails with TORTURE_ERRNO; with TORTURE_STICKY=1 all later calls of its kind fail, too
//   TORTURE_SHORT=n   call n, if it writes, writes half and says so
//   TORTURE_DISK=b    a disk that has room for b bytes
//   TORTURE_TRACE=f   notes in file f all calls, and what they changed, for torture.py to replay
// C's library does not call our functions from inside its streams. So streams on watched files are made with
// fopencookie, on top of our functions, and fileno() knows their descriptors.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

enum { DESCRIPTORS = 1024, STREAMS = 64 };
static char *paths[DESCRIPTORS]; // of each open descriptor below the folder
static struct {
    FILE *stream;
    int descriptor;
} streams[STREAMS];
static const char *folder;
static long calls, kill_at, torn_at, fail_at, short_at, error_number, sticky, room;
static char sticky_kind[16];
static int trace = -1;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static void __attribute__((constructor)) start(void) {
    folder = getenv("TORTURE_OUT");
    kill_at = setting("TORTURE_KILL", 0);
    torn_at = setting("TORTURE_TORN", 0);
    fail_at = setting("TORTURE_FAIL", 0);
    short_at = setting("TORTURE_SHORT", 0);
    error_number = setting("TORTURE_ERRNO", EIO);
    sticky = setting("TORTURE_STICKY", 0);
    room = setting("TORTURE_DISK", 1L << 60);
    if (getenv("TORTURE_TRACE"))
        trace = REAL(open)(getenv("TORTURE_TRACE"), O_WRONLY | O_CREAT | O_APPEND, 0666);
}

static int is_below(const char *path) {
    size_t n = folder ? strlen(folder) : 0;
    return n > 0 && strncmp(path, folder, n) == 0 && (path[n] == 0 || path[n] == '/');
}

static int is_watched(int fd) { return fd >= 0 && fd < DESCRIPTORS && paths[fd]; }

static void __attribute__((format(printf, 1, 2))) note(const char *format, ...) {
    int kept = errno;
    va_list arguments;
    va_start(arguments, format);
    if (trace >= 0 && vdprintf(trace, format, arguments) < 0) abort();
    va_end(arguments);
    errno = kept;
}

// Counts a call. Returns 0, or -1 with errno set when this call is to fail; or kills the process.
static int enter(const char *kind, const char *path) {
    calls++;
    note("call %s %s\n", kind, path);
    if (calls == kill_at) kill(getpid(), SIGKILL);
    int fails = calls == fail_at || (sticky && strcmp(kind, sticky_kind) == 0);
    if (calls == fail_at) strcpy(sticky_kind, kind);
    if (fails) errno = (int)error_number;
    return fails ? -1 : 0;
}

static long size_of(const char *path) {
    struct stat status;
    return stat(path, &status) == 0 && S_ISREG(status.st_mode) ? (long)status.st_size : 0;
}

static int open_file(const char *path, int flags, mode_t mode) {
    if (!is_below(path)) return REAL(open)(path, flags, mode);
    if (enter(flags & O_CREAT ? "create" : "open", path)) return -1;
    long freed = flags & O_TRUNC ? size_of(path) : 0;
    if (flags & O_CREAT && room <= 0 && access(path, F_OK) != 0) return errno = ENOSPC, -1;
    int fd = REAL(open)(path, flags, mode);
    if (fd < 0 || fd >= DESCRIPTORS) return fd;
    paths[fd] = strdup(path);
    room += freed;
    note("open %d %d %d %s\n", fd, !!(flags & O_CREAT), !!(flags & O_TRUNC), path);
    return fd;
}

int open(const char *path, int flags, ...) {
    va_list arguments;
    va_start(arguments, flags);
    mode_t mode = flags & O_CREAT ? va_arg(arguments, mode_t) : 0;
    va_end(arguments);
    return open_file(path, flags, mode);
}

int close(int fd) {
    if (!is_watched(fd)) return REAL(close)(fd);
    int failed = enter("close", paths[fd]), kept = errno;
    note("close %d\n", fd);
    free(paths[fd]);
    paths[fd] = NULL;
    int result = REAL(close)(fd);
    return failed ? errno = kept, -1 : result;
}

// Both kinds of write; at < 0: where the file stands.
static ssize_t write_file(int fd, const void *bytes, size_t size, off_t at) {
    if (enter("write", paths[fd])) return -1;
    int torn = calls == torn_at;
    if (torn || calls == short_at) size -= size / 2;
    if ((long)size > room) size = (size_t)room;
    if (size == 0) return errno = ENOSPC, -1;
    ssize_t done = at < 0 ? REAL(write)(fd, bytes, size) : REAL(pwrite)(fd, bytes, size, at);
    if (done > 0) {
        room -= done;
        note("write %d %ld %zd\n", fd, (long)(at < 0 ? lseek(fd, 0, SEEK_CUR) - done : at), done);
        if (trace >= 0 && REAL(write)(trace, bytes, (size_t)done) != done) abort();
    }
    if (torn) kill(getpid(), SIGKILL);
    return done;
}

ssize_t write(int fd, const void *bytes, size_t size) {
    return is_watched(fd) && size ? write_file(fd, bytes, size, -1) : REAL(write)(fd, bytes, size);
}

ssize_t pwrite(int fd, const void *bytes, size_t size, off_t at) {
    return is_watched(fd) && size ? write_file(fd, bytes, size, at) : REAL(pwrite)(fd, bytes, size, at);
}

int ftruncate(int fd, off_t length) {
    struct stat status;
    if (is_watched(fd) && enter("ftruncate", paths[fd])) return -1;
    if (is_watched(fd) && fstat(fd, &status) == 0)
        room += status.st_size > length ? status.st_size - length : 0;
    int result = REAL(ftruncate)(fd, length);
    if (is_watched(fd) && result == 0) note("ftruncate %d %ld\n", fd, (long)length);
    return result;
}

int fsync(int fd) {
    if (is_watched(fd) && enter("fsync", paths[fd])) return -1;
    int result = REAL(fsync)(fd);
    if (is_watched(fd) && result == 0) note("fsync %d\n", fd);
    return result;
}

int fdatasync(int fd) { return fsync(fd); }

int rename(const char *from, const char *to) {
    if (is_below(from) && enter("rename", from)) return -1;
    long freed = is_below(to) ? size_of(to) : 0;
    int result = REAL(rename)(from, to);
    if (is_below(from) && result == 0) note("rename %s\t%s\n", from, to), room += freed;
    return result;
}

int unlink(const char *path) {
    if (is_below(path) && enter("unlink", path)) return -1;
    long freed = is_below(path) ? size_of(path) : 0;
    int result = REAL(unlink)(path);
    if (is_below(path) && result == 0) note("unlink %s\n", path), room += freed;
    return result;
}

int rmdir(const char *path) {
    if (is_below(path) && enter("rmdir", path)) return -1;
    int result = REAL(rmdir)(path);
    if (is_below(path) && result == 0) note("rmdir %s\n", path);
    return result;
}

int mkdir(const char *path, mode_t mode) {
    if (is_below(path) && enter("mkdir", path)) return -1;
    if (is_below(path) && room <= 0 && access(path, F_OK) != 0) return errno = ENOSPC, -1;
    int result = REAL(mkdir)(path, mode);
    if (is_below(path) && result == 0) note("mkdir %s\n", path);
    return result;
}

DIR *opendir(const char *path) {
    if (is_below(path) && enter("opendir", path)) return NULL;
    DIR *result = REAL(opendir)(path);
    if (result && is_below(path) && dirfd(result) < DESCRIPTORS) paths[dirfd(result)] = strdup(path);
    return result;
}

struct dirent *readdir(DIR *directory) {
    return is_watched(dirfd(directory)) && enter("readdir", paths[dirfd(directory)])
               ? NULL
               : REAL(readdir)(directory);
}

int closedir(DIR *directory) {
    int fd = dirfd(directory);
    if (is_watched(fd)) {
        free(paths[fd]);
        paths[fd] = NULL;
    }
    return REAL(closedir)(directory);
}

// ---- streams ----

static ssize_t stream_write(void *cookie, const char *bytes, size_t size) { // all of it, as C's library does
    size_t done = 0;
    for (ssize_t n; done < size; done += (size_t)n)
        if ((n = write((int)(long)cookie, bytes + done, size - done)) < 0) break;
    return (ssize_t)done;
}

static ssize_t stream_read(void *cookie, char *bytes, size_t size) {
    int fd = (int)(long)cookie;
    return enter("read", paths[fd]) ? -1 : read(fd, bytes, size);
}

static int stream_seek(void *cookie, off64_t *at, int whence) {
    return (*at = lseek((int)(long)cookie, *at, whence)) < 0 ? -1 : 0;
}

static int stream_close(void *cookie) {
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].stream && streams[i].descriptor == (int)(long)cookie) streams[i].stream = NULL;
    return close((int)(long)cookie);
}

FILE *fdopen(int fd, const char *mode) {
    if (!is_watched(fd)) return REAL(fdopen)(fd, mode);
    int i = 0;
    while (streams[i].stream) i++;
    streams[i].descriptor = fd;
    return streams[i].stream =
               fopencookie((void *)(long)fd, mode,
                           (cookie_io_functions_t){stream_read, stream_write, stream_seek, stream_close});
}

FILE *fopen(const char *path, const char *mode) {
    if (!is_below(path)) return REAL(fopen)(path, mode);
    int flags = *mode == 'r' ? O_RDONLY : O_CREAT | (*mode == 'a' ? O_APPEND : O_TRUNC);
    int fd = open_file(path, strchr(mode, '+') ? flags | O_RDWR : *mode == 'r' ? flags : flags | O_WRONLY, 0666);
    return fd < 0 ? NULL : fdopen(fd, mode);
}

int fileno(FILE *stream) {
    for (int i = 0; i < STREAMS; i++)
        if (streams[i].stream == stream) return streams[i].descriptor;
    return REAL(fileno)(stream);
}
