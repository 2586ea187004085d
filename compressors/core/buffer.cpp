#include "compressors/core/buffer.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <utility>

#include "compressors/core/error.hpp"

namespace thinwire {
namespace {

constexpr std::size_t kPage = 4096;
constexpr std::size_t kHugePage = std::size_t(2) << 20;
// Array j of the arena starts j × this past its huge page: measured to break the power-of-two distances that halve stream bandwidth.
constexpr std::size_t kStagger = (std::size_t(1) << 20) + 1344;

}  // namespace

void Buffer::Free::operator()(std::byte* p) const noexcept { std::free(p); }

bool Buffer::reserve(std::size_t bytes) {
  if (bytes <= size_) return false;
  const std::size_t alignment = bytes >= kHugePage ? kHugePage : kPage;
  const std::size_t rounded = round_up(bytes, alignment);
  data_.reset();
  size_ = 0;
  auto* p = static_cast<std::byte*>(std::aligned_alloc(alignment, rounded));
  if (p == nullptr) throw std::bad_alloc();
  if (alignment == kHugePage) madvise(p, rounded, MADV_HUGEPAGE);  // advice only: failure changes speed, not results
  data_.reset(p);
  size_ = rounded;
  return true;
}

Arena::Arena(std::span<const std::size_t> counts) : counts_(counts.begin(), counts.end()) {
  std::vector<std::size_t> offsets;
  std::size_t end = 0;
  for (std::size_t j = 0; j < counts_.size(); ++j) {
    const std::size_t offset = round_up(end, kHugePage) + j * kStagger;
    offsets.push_back(offset);
    end = offset + round_up(counts_[j] * sizeof(float), 64);
  }
  arrays_.assign(counts_.size(), nullptr);
  if (end == 0) return;
  mapped_ = round_up(end, kHugePage) + kHugePage;
  mapping_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapping_ == MAP_FAILED) {
    mapping_ = nullptr;
    fail(Errc::device, "no memory for " + std::to_string(mapped_) + " bytes of state");
  }
  const std::size_t base = round_up(reinterpret_cast<std::size_t>(mapping_), kHugePage);
  madvise(reinterpret_cast<void*>(base), mapped_ - kHugePage, MADV_HUGEPAGE);
  for (std::size_t j = 0; j < counts_.size(); ++j) arrays_[j] = reinterpret_cast<float*>(base + offsets[j]);
}

Arena::Arena(std::span<const std::size_t> counts, int device) : counts_(counts.begin(), counts.end()) {
  constexpr std::size_t kLine = 256;
  std::size_t end = 0;
  for (const std::size_t count : counts_) end += round_up(count * sizeof(float), kLine);
  stream_ = std::make_unique<DeviceStream>(device);
  device_.reserve(std::max(end, kLine), device);
  std::byte* at = device_.data();
  for (const std::size_t count : counts_) {
    arrays_.push_back(reinterpret_cast<float*>(at));
    at += round_up(count * sizeof(float), kLine);
  }
  clear();
}

void Arena::read(StateArray from, std::span<float> to) const {
  if (stream_ == nullptr) return load_state(from, to.data(), to.size());
  std::vector<std::uint16_t> narrow(from.narrow() ? to.size() : 0);
  void* const host = from.narrow() ? static_cast<void*>(narrow.data()) : to.data();
  device_copy(host, from.data(), to.size() * size_of(from.dtype()), stream_->get());
  device_wait(stream_->get());
  if (from.narrow()) load_state(narrow.data(), to.data(), to.size());
}

void Arena::write(std::span<const float> from, StateArray to) {
  if (stream_ == nullptr) return store_state(from.data(), to, from.size());
  std::vector<std::uint16_t> narrow(to.narrow() ? from.size() : 0);
  if (to.narrow()) store_state(from.data(), narrow.data(), from.size());
  const void* const host = to.narrow() ? static_cast<const void*>(narrow.data()) : from.data();
  device_copy(to.data(), host, from.size() * size_of(to.dtype()), stream_->get());
  device_wait(stream_->get());
}

void Arena::clear() {
  if (stream_ != nullptr) {
    device_clear(device_.bytes(), stream_->get());
    device_wait(stream_->get());
    return;
  }
  for (std::size_t j = 0; j < arrays_.size(); ++j)
    if (counts_[j] != 0) std::memset(arrays_[j], 0, counts_[j] * sizeof(float));
}

Arena::~Arena() {
  if (mapping_ != nullptr) munmap(mapping_, mapped_);
}

Arena::Arena(Arena&& other) noexcept { *this = std::move(other); }

Arena& Arena::operator=(Arena&& other) noexcept {
  std::swap(mapping_, other.mapping_);
  std::swap(mapped_, other.mapped_);
  std::swap(arrays_, other.arrays_);
  std::swap(counts_, other.counts_);
  std::swap(device_, other.device_);
  std::swap(stream_, other.stream_);
  return *this;
}

}  // namespace thinwire
