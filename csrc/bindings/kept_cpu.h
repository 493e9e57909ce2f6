// Scratch memory that stays from call to call. For the sizes of activations malloc would give it
// back to the system in between, and touching it anew costs a page fault per 4 KB.
#pragma once

#include <sys/mman.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <vector>

namespace weightshare {

constexpr size_t kHugePage = size_t{2} << 20;

// Asks for huge pages where a range holds some: one page fault per 2 MB.
inline void advise_huge(void* data, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  const auto start = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const auto end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#endif
}

class Kept {
 public:
  explicit Kept(size_t bytes) {
    constexpr size_t kAlign = 64;
    size_ = (bytes + kAlign) / kAlign * kAlign;
    if (size_ >= 2 * kHugePage) size_ = (size_ + kHugePage - 1) / kHugePage * kHugePage;
    {
      const std::lock_guard<std::mutex> lock(mutex());
      auto& blocks = free_blocks();
      for (size_t i = 0; i < blocks.size(); ++i) {
        if (blocks[i].size < size_ || blocks[i].size / 4 > size_) continue;
        data_ = blocks[i].data, size_ = blocks[i].size;
        blocks.erase(blocks.begin() + i);
        return;
      }
    }
    data_ = std::aligned_alloc(size_ >= 2 * kHugePage ? kHugePage : kAlign, size_);
    if (data_ == nullptr) throw std::bad_alloc();
    if (size_ >= 2 * kHugePage) advise_huge(data_, size_);
  }
  ~Kept() {
    const std::lock_guard<std::mutex> lock(mutex());
    auto& blocks = free_blocks();
    size_t total = size_;
    for (const Block& block : blocks) total += block.size;
    while (total > kLimit && !blocks.empty()) {  // the one freed longest ago goes first
      total -= blocks.front().size;
      std::free(blocks.front().data);
      blocks.erase(blocks.begin());
    }
    if (total > kLimit) {
      std::free(data_);
    } else {
      blocks.push_back({data_, size_});
    }
  }
  Kept(const Kept&) = delete;

  template <class T>
  T* as() const {
    return static_cast<T*>(data_);
  }

 private:
  struct Block {
    void* data;
    size_t size;
  };
  static constexpr size_t kLimit = size_t{256} << 20;
  static std::vector<Block>& free_blocks() {
    static auto* blocks = new std::vector<Block>;  // outlives every thread
    return *blocks;
  }
  static std::mutex& mutex() {
    static auto* lock = new std::mutex;
    return *lock;
  }

  void* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace weightshare
