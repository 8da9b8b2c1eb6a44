// Finds, hashes and scans kernel sources; the include graph is followed by name, as NVRTC gets it.
#include "cc/sources.h"

#include <dirent.h>

#include <algorithm>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <map>
#include <set>
#include <utility>

#include "cc/kernel_sources.h"
#include "cc/sha256.h"

namespace jfa {
namespace {

// Quoted includes by line. One inside a comment counts too: that costs a recompile, never a stale
// entry.
std::vector<std::string> QuotedIncludes(std::string_view source) {
  std::vector<std::string> names;
  while (!source.empty()) {
    const size_t end = source.find('\n');
    std::string_view line = source.substr(0, end);
    source.remove_prefix(end == std::string_view::npos ? source.size() : end + 1);
    const auto skip = [&line](std::string_view word) {
      const size_t first = line.find_first_not_of(" \t");
      if (first == std::string_view::npos || line.substr(first, word.size()) != word) return false;
      line.remove_prefix(first + word.size());
      return true;
    };
    if (!skip("#") || !skip("include") || !skip("\"")) continue;
    const size_t quote = line.find('"');
    if (quote != std::string_view::npos) names.emplace_back(line.substr(0, quote));
  }
  return names;
}

std::shared_ptr<const SourceFile> MakeFile(std::string name, std::string contents) {
  auto file = std::make_shared<SourceFile>();
  file->name = std::move(name);
  file->sha256 = Sha256().Update(contents).FinishHex();
  file->includes = QuotedIncludes(contents);
  file->contents = std::move(contents);
  return file;
}

using FileMap = std::map<std::string, std::shared_ptr<const SourceFile>, std::less<>>;

// Hashed once per process.
const FileMap& EmbeddedFiles() {
  static const auto* files = [] {
    auto* map = new FileMap;
    for (size_t i = 0; i < kNumKernelSources; ++i) {
      const EmbeddedFile& file = kKernelSources[i];
      map->emplace(file.name, MakeFile(file.name, std::string(file.data, file.size)));
    }
    return map;
  }();
  return *files;
}

std::string OverrideDirectory() {
  const char* directory = std::getenv("JFA_KERNEL_DIR");
  return directory != nullptr ? directory : "";
}

// A file of the override directory wins over the embedded one of that name, and is read anew each
// time. Null if there is none.
std::shared_ptr<const SourceFile> FindFile(const std::string& directory, const std::string& name) {
  if (!directory.empty() && name.find('/') == std::string::npos) {
    std::ifstream stream(directory + "/" + name, std::ios::binary);
    if (stream.is_open()) {
      std::string contents((std::istreambuf_iterator<char>(stream)),
                           std::istreambuf_iterator<char>());
      return MakeFile(name, std::move(contents));
    }
  }
  const auto it = EmbeddedFiles().find(name);
  return it != EmbeddedFiles().end() ? it->second : nullptr;
}

}  // namespace

SourceFiles IncludedFiles(std::string_view source) {
  const std::string directory = OverrideDirectory();
  FileMap found;  // null: seen, not there
  std::vector<std::string> todo = QuotedIncludes(source);
  while (!todo.empty()) {
    const std::string name = std::move(todo.back());
    todo.pop_back();
    if (found.count(name) != 0) continue;
    const auto file = FindFile(directory, name);
    found.emplace(name, file);
    if (file != nullptr) todo.insert(todo.end(), file->includes.begin(), file->includes.end());
  }
  SourceFiles files;
  for (const auto& [name, file] : found) {
    if (file != nullptr) files.push_back(file);
  }
  return files;
}

SourceFiles AllKernelFiles() {
  const std::string directory = OverrideDirectory();
  std::set<std::string> names;
  for (const auto& [name, file] : EmbeddedFiles()) names.insert(name);
  if (DIR* listing = directory.empty() ? nullptr : opendir(directory.c_str())) {
    while (const dirent* entry = readdir(listing)) {
      const std::string name = entry->d_name;
      const size_t dot = name.rfind('.');
      const std::string suffix = dot == std::string::npos ? "" : name.substr(dot);
      if (dot != 0 && (suffix == ".h" || suffix == ".cuh")) names.insert(name);
    }
    closedir(listing);
  }
  SourceFiles files;
  for (const std::string& name : names) {
    if (auto file = FindFile(directory, name)) files.push_back(std::move(file));
  }
  return files;
}

}  // namespace jfa
