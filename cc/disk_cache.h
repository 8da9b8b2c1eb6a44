// Compiled kernels on disk: one file per key, written whole or not at all.
//
// Nothing here can fail a call: what can't be read is "not there", what can't be written is kept in
// memory only. Any number of processes may use one directory at once, NFS included, without locks.
#ifndef JAX_FLASHATTN_CC_DISK_CACHE_H_
#define JAX_FLASHATTN_CC_DISK_CACHE_H_

#include <string>

namespace jfa {

struct CacheRecord {
  std::string symbol;
  std::string cubin;
  std::string log;
};

// $JFA_CACHE_DIR, else $XDG_CACHE_HOME/jax_flashattn, else ~/.cache/jax_flashattn; empty if none of
// the variables is set.
std::string CacheDirectory();

// True and the record if a whole, undamaged entry of that key is in the directory.
bool ReadCacheEntry(const std::string& directory, const std::string& key, CacheRecord* record);

// Publishes an entry, replacing one that is there. An empty string, or what went wrong.
std::string WriteCacheEntry(const std::string& directory, const std::string& key,
                            const CacheRecord& record);

}  // namespace jfa

#endif  // JAX_FLASHATTN_CC_DISK_CACHE_H_
