// Entry file `<key>.jfa`, integers little-endian:
//
//   magic "JFAENTRY" | u32 schema | u32 0 | u64 body bytes | SHA-256 of the body | body
//   body: four fields {u64 bytes, data}: key, symbol, log, cubin
//
// The checksum catches truncation and damage, the key inside a file that was renamed or copied.
// Entries are written under a temporary name that no other writer can have, synced and renamed: a
// reader sees all of an entry or none of it, also after a crash.
#include "cc/disk_cache.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <string_view>
#include <utility>

#include "cc/sha256.h"

namespace jfa {
namespace {

constexpr char kMagic[] = "JFAENTRY";
constexpr uint32_t kSchema = 1;
constexpr size_t kHeaderBytes = 8 + 4 + 4 + 8 + 32;
constexpr uint64_t kMaxEntryBytes = uint64_t{1} << 28;  // far above any kernel
constexpr char kTemporaryPrefix[] = ".tmp.";
constexpr time_t kStaleSeconds = 24 * 60 * 60;

class FileDescriptor {
 public:
  explicit FileDescriptor(int fd) : fd_(fd) {}
  ~FileDescriptor() { Close(); }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;

  int get() const { return fd_; }
  bool Close() {
    const int fd = std::exchange(fd_, -1);
    return fd < 0 || close(fd) == 0;
  }

 private:
  int fd_;
};

template <typename T>
void AppendInteger(T value, std::string* text) {
  for (size_t i = 0; i < sizeof(T); ++i) *text += static_cast<char>(value >> (8 * i) & 0xff);
}

template <typename T>
T ParseInteger(std::string_view bytes) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) {
    value |= static_cast<T>(static_cast<uint8_t>(bytes[i])) << (8 * i);
  }
  return value;
}

void AppendField(std::string_view field, std::string* body) {
  AppendInteger<uint64_t>(field.size(), body);
  *body += field;
}

bool TakeField(std::string_view* body, std::string* field) {
  if (body->size() < 8) return false;
  const auto size = ParseInteger<uint64_t>(*body);
  body->remove_prefix(8);
  if (body->size() < size) return false;
  field->assign(body->data(), size);
  body->remove_prefix(size);
  return true;
}

std::string Checksum(std::string_view body) {
  const Sha256::Digest digest = Sha256().Update(body).Finish();
  return std::string(reinterpret_cast<const char*>(digest.data()), digest.size());
}

bool ReadFile(const std::string& path, std::string* contents) {
  // Non-blocking, so that something odd under that name, a FIFO say, can't hang the process.
  FileDescriptor file(open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  struct stat info;
  if (file.get() < 0 || fstat(file.get(), &info) != 0 || !S_ISREG(info.st_mode) ||
      static_cast<uint64_t>(info.st_size) > kMaxEntryBytes) {
    return false;
  }
  contents->resize(info.st_size);
  for (size_t at = 0; at < contents->size();) {
    const ssize_t n = read(file.get(), contents->data() + at, contents->size() - at);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    at += n;
  }
  return true;
}

bool WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(n);
  }
  return true;
}

// Like `mkdir -p`, each new directory for its owner alone.
bool MakeDirectories(const std::string& path) {
  struct stat info;
  for (size_t slash = path.find('/', 1); slash != std::string::npos;
       slash = path.find('/', slash + 1)) {
    mkdir(path.substr(0, slash).c_str(), 0700);
  }
  mkdir(path.c_str(), 0700);
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

// Removes what writers that were killed left behind, long ago.
void RemoveStaleTemporaries(const std::string& directory) {
  DIR* listing = opendir(directory.c_str());
  if (listing == nullptr) return;
  while (const dirent* file = readdir(listing)) {
    if (std::strncmp(file->d_name, kTemporaryPrefix, sizeof(kTemporaryPrefix) - 1) != 0) continue;
    const std::string path = directory + "/" + file->d_name;
    struct stat info;
    if (lstat(path.c_str(), &info) == 0 && std::time(nullptr) - info.st_mtime > kStaleSeconds) {
      unlink(path.c_str());
    }
  }
  closedir(listing);
}

std::string TemporaryName() {
  uint64_t random[2] = {};
  if (getrandom(random, sizeof(random), GRND_NONBLOCK) != sizeof(random)) {
    // O_EXCL keeps a clash of the weaker name from doing harm.
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    random[0] = static_cast<uint64_t>(now.tv_sec) << 32 | now.tv_nsec;
    random[1] = reinterpret_cast<uintptr_t>(&now);
  }
  char name[80];
  std::snprintf(name, sizeof(name), "%s%ld.%016llx%016llx", kTemporaryPrefix,
                static_cast<long>(getpid()), static_cast<unsigned long long>(random[0]),
                static_cast<unsigned long long>(random[1]));
  return name;
}

std::string Failed(const char* what, const std::string& path, int error) {
  return std::string("can't ") + what + " " + path + ": " + std::strerror(error);
}

}  // namespace

std::string CacheDirectory() {
  const auto value = [](const char* name) -> std::string {
    const char* text = std::getenv(name);
    return text != nullptr ? text : "";
  };
  if (const std::string dir = value("JFA_CACHE_DIR"); !dir.empty()) return dir;
  // The XDG specification has relative paths ignored.
  if (const std::string dir = value("XDG_CACHE_HOME"); !dir.empty() && dir[0] == '/') {
    return dir + "/jax_flashattn";
  }
  if (const std::string home = value("HOME"); !home.empty()) return home + "/.cache/jax_flashattn";
  return "";
}

bool ReadCacheEntry(const std::string& directory, const std::string& key, CacheRecord* record) {
  std::string contents;
  if (directory.empty() || !ReadFile(directory + "/" + key + ".jfa", &contents)) return false;
  std::string_view body = contents;
  if (body.size() < kHeaderBytes || body.substr(0, 8) != kMagic ||
      ParseInteger<uint32_t>(body.substr(8)) != kSchema ||
      ParseInteger<uint64_t>(body.substr(16)) != body.size() - kHeaderBytes) {
    return false;
  }
  const std::string_view checksum = body.substr(24, 32);
  body.remove_prefix(kHeaderBytes);
  if (Checksum(body) != checksum) return false;
  std::string stored_key;
  return TakeField(&body, &stored_key) && stored_key == key && TakeField(&body, &record->symbol) &&
         TakeField(&body, &record->log) && TakeField(&body, &record->cubin) && body.empty();
}

std::string WriteCacheEntry(const std::string& directory, const std::string& key,
                            const CacheRecord& record) {
  if (directory.empty()) return "no cache directory: neither JFA_CACHE_DIR nor HOME is set";
  if (!MakeDirectories(directory)) return Failed("create", directory, errno);
  RemoveStaleTemporaries(directory);

  std::string body;
  for (std::string_view field : {std::string_view(key), std::string_view(record.symbol),
                                 std::string_view(record.log), std::string_view(record.cubin)}) {
    AppendField(field, &body);
  }
  std::string header = kMagic;
  AppendInteger<uint32_t>(kSchema, &header);
  AppendInteger<uint32_t>(0, &header);
  AppendInteger<uint64_t>(body.size(), &header);
  header += Checksum(body);

  const std::string temporary = directory + "/" + TemporaryName();
  const std::string path = directory + "/" + key + ".jfa";
  FileDescriptor file(open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600));
  if (file.get() < 0) return Failed("create", temporary, errno);
  // Some file systems report a full disk or quota only on sync or close.
  if (!WriteAll(file.get(), header) || !WriteAll(file.get(), body) || fsync(file.get()) != 0 ||
      !file.Close() || rename(temporary.c_str(), path.c_str()) != 0) {
    const int error = errno;
    unlink(temporary.c_str());
    return Failed("write", path, error);
  }
  // So that the rename itself survives a crash; without it the entry is at worst compiled again.
  FileDescriptor listing(open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (listing.get() >= 0) fsync(listing.get());
  return "";
}

}  // namespace jfa
