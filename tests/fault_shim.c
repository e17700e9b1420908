/* Makes a file operation of a command fail, for test_faults.py, which builds it and loads it
   with LD_PRELOAD.

   Environment: FAULT_DIR, under which operations count; FAULT_COUNT, a file of eight bytes shared by
   all processes that holds how many there have been; FAULT_ONLY, a pattern of those that count, as
   "open /path/of/*"; FAULT_AT, the number of the one that fails (from 1; none if 0); FAULT_ERRNO;
   FAULT_STICKY=1 if all that write fail from there on, as on a full disk; FAULT_LOG, a file that the
   failed ones are written into, or all, if none is to fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long *counter(void) {
  static long *shared;
  const char *path = getenv("FAULT_COUNT");
  if (!shared && path) {
    int fd = REAL(open)(path, O_RDWR);
    if (fd < 0) return NULL;
    void *mapped = mmap(NULL, sizeof(long), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    if (mapped != MAP_FAILED) shared = mapped;
  }
  return shared;
}

static int below(int dirfd, const char *path) {
  const char *folder = getenv("FAULT_DIR");
  char whole[PATH_MAX * 2];
  if (!folder || !path) return 0;
  if (path[0] != '/') {
    char link[64], base[PATH_MAX];
    ssize_t n;
    snprintf(link, sizeof link, dirfd == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dirfd);
    if ((n = readlink(link, base, sizeof base - 1)) < 0) return 0;
    base[n] = 0;
    snprintf(whole, sizeof whole, "%s/%s", base, path);
    path = whole;
  }
  return strncmp(path, folder, strlen(folder)) == 0;
}

/* Whether this operation is one to fail; sets errno if it is. */
static int fails(const char *operation, int dirfd, const char *path, int writes) {
  const char *at = getenv("FAULT_AT"), *log = getenv("FAULT_LOG"), *only = getenv("FAULT_ONLY");
  char line[PATH_MAX * 2 + 64];
  long *count, number, wanted = at ? atol(at) : 0;
  int n, sticky = getenv("FAULT_STICKY") != NULL;
  if (sticky && !writes) return 0; /* a full disk can be read */
  if (!below(dirfd, path) || !(count = counter())) return 0;
  n = snprintf(line, sizeof line, "%s %s\n", operation, path);
  line[n - 1] = 0;
  /* All that come after one that counts go on counting where the disk is full. */
  if (only && !(sticky && *count) && fnmatch(only, line, 0)) return 0;
  line[n - 1] = '\n';
  number = __atomic_add_fetch(count, 1, __ATOMIC_SEQ_CST);
  if (wanted && number != wanted && !(sticky && number > wanted)) return 0;
  if (log) {
    int fd = REAL(open)(log, O_WRONLY | O_CREAT | O_APPEND, 0644);
    if (fd >= 0) { if (REAL(write)(fd, line, n) < 0) {} close(fd); }
  }
  if (!wanted) return 0;
  errno = atoi(getenv("FAULT_ERRNO"));
  return 1;
}

static int fails_fd(const char *operation, int fd) {
  char link[64], path[PATH_MAX];
  ssize_t n;
  if (!getenv("FAULT_DIR")) return 0;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  if ((n = readlink(link, path, sizeof path - 1)) < 0) return 0;
  path[n] = 0;
  return path[0] == '/' && fails(operation, AT_FDCWD, path, 1); /* no pipes or sockets */
}

#define MODE \
  mode_t mode = 0; \
  if (flags & (O_CREAT | __O_TMPFILE)) { va_list rest; va_start(rest, flags); mode = va_arg(rest, mode_t); va_end(rest); }
#define WRITES ((flags & (O_CREAT | O_WRONLY | O_RDWR)) != 0)

int open(const char *path, int flags, ...) { MODE; return fails("open", AT_FDCWD, path, WRITES) ? -1 : REAL(open)(path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE; return fails("open", AT_FDCWD, path, WRITES) ? -1 : REAL(open64)(path, flags, mode); }
int openat(int dir, const char *path, int flags, ...) { MODE; return fails("open", dir, path, WRITES) ? -1 : REAL(openat)(dir, path, flags, mode); }
int openat64(int dir, const char *path, int flags, ...) { MODE; return fails("open", dir, path, WRITES) ? -1 : REAL(openat64)(dir, path, flags, mode); }
ssize_t write(int fd, const void *data, size_t n) { return fails_fd("write", fd) ? -1 : REAL(write)(fd, data, n); }
ssize_t writev(int fd, const struct iovec *data, int n) { return fails_fd("write", fd) ? -1 : REAL(writev)(fd, data, n); }
ssize_t pwrite(int fd, const void *data, size_t n, off_t at) { return fails_fd("write", fd) ? -1 : REAL(pwrite)(fd, data, n, at); }
ssize_t pwrite64(int fd, const void *data, size_t n, off64_t at) { return fails_fd("write", fd) ? -1 : REAL(pwrite64)(fd, data, n, at); }
int fsync(int fd) { return fails_fd("fsync", fd) ? -1 : REAL(fsync)(fd); }
int fdatasync(int fd) { return fails_fd("fsync", fd) ? -1 : REAL(fdatasync)(fd); }
int rename(const char *from, const char *to) { return fails("rename", AT_FDCWD, to, 1) ? -1 : REAL(rename)(from, to); }
int renameat(int a, const char *from, int b, const char *to) { return fails("rename", b, to, 1) ? -1 : REAL(renameat)(a, from, b, to); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return fails("rename", b, to, 1) ? -1 : REAL(renameat2)(a, from, b, to, flags); }
int mkdir(const char *path, mode_t mode) { return fails("mkdir", AT_FDCWD, path, 1) ? -1 : REAL(mkdir)(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { return fails("mkdir", dir, path, 1) ? -1 : REAL(mkdirat)(dir, path, mode); }
