// Addresses to source lines and kernel names, by addr2line (binutils): names of files without folders, innermost
// inlined function first.
#include "machine.h"

#include <dlfcn.h>
#include <link.h>

#include <algorithm>
#include <cstdio>
#include <cstring>

namespace simt {
namespace {

Image found{};

int visit(dl_phdr_info* info, size_t, void*) {
  const uintptr_t here = reinterpret_cast<uintptr_t>(&machine);
  Image candidate{uintptr_t(info->dlpi_addr), ~uintptr_t(0), 0, 0, 0};
  for (int i = 0; i < info->dlpi_phnum; i++) {
    const auto& header = info->dlpi_phdr[i];
    if (header.p_type != PT_LOAD) continue;
    const uintptr_t low = info->dlpi_addr + header.p_vaddr, high = low + header.p_memsz;
    candidate.low = std::min(candidate.low, low);
    candidate.high = std::max(candidate.high, high);
    if (header.p_flags & PF_W) {
      candidate.writable_low = low;
      candidate.writable_high = high;
    }
  }
  if (here < candidate.low || here >= candidate.high) return 0;
  found = candidate;
  return 1;
}

// What addr2line prints for these offsets, one string of lines each.
std::vector<std::string> addr2line(const char* options, const std::vector<uint32_t>& offsets) {
  Dl_info file;
  dladdr(reinterpret_cast<void*>(&run), &file);
  std::string command = std::string("addr2line -a ") + options + " -e '" + file.dli_fname + "'";
  char text[4096];
  for (uint32_t offset : offsets) {
    snprintf(text, sizeof text, " 0x%x", offset);
    command += text;
  }
  std::vector<std::string> out;
  FILE* pipe = offsets.empty() ? nullptr : popen((command + " 2>/dev/null").c_str(), "r");
  while (pipe && fgets(text, sizeof text, pipe)) {
    if (std::strncmp(text, "0x", 2) == 0) out.emplace_back();
    else if (!out.empty()) out.back() += text;
  }
  if (pipe) pclose(pipe);
  out.resize(offsets.size());
  return out;
}

}  // namespace

const Image& image() {
  if (!found.high) dl_iterate_phdr(visit, nullptr);
  return found;
}

uint32_t offset_of(const void* pc) { return uint32_t(reinterpret_cast<uintptr_t>(pc) - image().base); }

std::vector<std::string> source_lines(const std::vector<uint32_t>& offsets) {
  std::vector<uint32_t> calls(offsets);
  for (uint32_t& offset : calls) offset--;  // a return address: the call is before it
  std::vector<std::string> out;
  for (const std::string& lines : addr2line("-i -s", calls)) {
    std::string chain;
    for (size_t at = 0; at < lines.size();) {
      const size_t end = std::min(lines.find('\n', at), lines.size());
      const size_t word = std::min(lines.find(' ', at), end);  // " (discriminator 3)" may follow
      chain += (chain.empty() ? "" : " < ") + lines.substr(at, word - at);
      at = end + 1;
    }
    out.push_back(chain.empty() ? "an unknown line" : chain);
  }
  return out;
}

std::string source_line(uint32_t offset) { return source_lines({offset})[0]; }

std::string function_name(const void* function) {
  static std::map<const void*, std::string> names;
  std::string& name = names[function];
  if (!name.empty()) return name;
  name = addr2line("-f -C", {offset_of(function)})[0];
  name = name.substr(0, name.find('\n'));
  for (const char* noise : {"(anonymous namespace)::", "pyllm::", "void "})
    for (size_t at; (at = name.find(noise)) != std::string::npos;) name.erase(at, std::strlen(noise));
  int depth = 0;
  for (size_t i = 0; i < name.size(); i++) {  // drop the parameters, but not parentheses in template arguments
    depth += (name[i] == '<') - (name[i] == '>');
    if (name[i] == '(' && depth == 0) name.resize(i);
  }
  if (name.empty() || name == "??") name = "kernel";
  return name;
}

}  // namespace simt
