#include "mlx/packed_weights.h"

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <mutex>
#include <new>
#include <optional>
#include <unordered_map>
#include <utility>
#include <vector>

#include "backend/cpu/matmul.h"
#include "common/environment.h"
#include "linear/plan.h"
#include "mfa/linear.h"

namespace mfa {
namespace {

constexpr size_t kDefaultLimit = size_t{512} << 20;
constexpr int64_t kMinBytes = 32 << 10;  // smaller weights stay in the first caches anyway
constexpr size_t kMaxEntries = 1024;     // weights remembered
constexpr uint64_t kSweepEvery = 64;     // lookups
// Products from the same weights until they are packed: about as many as it takes to gain what packing costs.
constexpr int kUses = 8;

size_t default_limit() {
  const auto megabytes = environment_packed_weights_megabytes().value;
  return megabytes ? static_cast<size_t>(*megabytes) << 20 : kDefaultLimit;
}

struct Key {
  const void* buffer;
  const void* first;
  int64_t stride;
  int32_t N, K;
  bool transposed;
  DType dtype;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& k) const {
    const std::hash<const void*> hash;
    return hash(k.buffer) * 31 + hash(k.first) + static_cast<size_t>(k.transposed);
  }
};

// Elements of the weights, spread over all of them, as one number.
uint64_t sample(const MatmulProblem& p) {
  constexpr int kSamples = 128;
  const int64_t rows = p.w.transposed ? p.N : p.K, columns = p.w.transposed ? p.K : p.N;
  const size_t size = size_of(p.dtype);
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  for (int64_t i = 0; i < kSamples; ++i) {
    const int64_t at = i * rows / kSamples * p.w.stride + i * 7919 % columns;
    uint32_t bits = 0;
    std::memcpy(&bits, static_cast<const char*>(p.w.data) + at * static_cast<int64_t>(size), size);
    hash = (hash ^ bits) * 1099511628211u;
  }
  return hash;
}

class Cache {
 public:
  std::shared_ptr<const cpu::AlignedBuffer> find(const MatmulProblem& p, const WeightBuffer& buffer) {
    const Key key{buffer.get(), p.w.data, p.w.stride, p.N, p.K, p.w.transposed, p.dtype};
    Dropped dropped;
    std::unique_lock lock(mutex_);
    const uint64_t now = ++clock_;
    if (now % kSweepEvery == 0) sweep(dropped);
    if (limit_ == 0 || p.M <= kDirectRows || p.w.quantised() || !buffer->is_owned() || weight_bytes(p) < kMinBytes)
      return nullptr;
    if (const MatmulTraits traits = cpu::matmul_traits(); traits != traits_) {
      clear(dropped);
      traits_ = traits;
    }
    Entry& entry = entries_[key];
    const uint64_t seen_at = std::exchange(entry.used, now);
    if (entry.panels) return entry.panels;
    const uint64_t contents = sample(p);
    const bool again = entry.seen.lock() == buffer && entry.contents == contents;
    entry.seen = buffer;
    entry.contents = contents;
    entry.uses = again ? std::min(entry.uses + 1, kUses) : 1;
    const bool worth = entry.uses == kUses;
    const size_t bytes = worth ? cpu::packed_weight_bytes(p) : 0;
    if (!worth || !make_room(bytes, seen_at, dropped)) {
      if (entries_.size() > kMaxEntries) forget_unpacked(dropped);
      return nullptr;
    }
    bytes_ += bytes;  // reserved
    lock.unlock();
    std::shared_ptr<const cpu::AlignedBuffer> panels = pack(p, bytes);
    lock.lock();
    Entry& made = entries_[key];
    if (!panels || made.panels || traits_ != cpu::matmul_traits()) {  // another thread was faster, or it is of no use
      bytes_ -= bytes;
      return made.panels;
    }
    made.panels = panels;
    made.bytes = bytes;
    made.pin = pin(buffer);
    make_room(0, ~uint64_t{0}, dropped);  // the limit may have changed
    return panels;
  }

  PackedWeights status() {
    Dropped dropped;
    const std::lock_guard lock(mutex_);
    sweep(dropped);
    const auto packed = std::count_if(entries_.begin(), entries_.end(), [](const auto& e) { return e.second.panels; });
    return {static_cast<size_t>(packed), bytes_, limit_};
  }

  size_t set_limit(size_t bytes) {
    Dropped dropped;
    const std::lock_guard lock(mutex_);
    const size_t before = std::exchange(limit_, bytes);
    sweep(dropped);
    make_room(0, ~uint64_t{0}, dropped);
    return before;
  }

 private:
  // The only reference of this cache to a buffer, whatever the number of its layouts.
  using Pin = std::shared_ptr<const WeightBuffer>;
  struct Entry {
    std::weak_ptr<mlx::core::array::Data> seen;  // last, with these contents
    uint64_t contents = 0;
    int uses = 0;       // in a row with these contents
    uint64_t used = 0;  // by the clock
    size_t bytes = 0;
    std::shared_ptr<const cpu::AlignedBuffer> panels;
    Pin pin;
  };
  using Entries = std::unordered_map<Key, Entry, KeyHash>;
  using Dropped = std::vector<Entries::node_type>;  // freed after the lock

  static std::shared_ptr<const cpu::AlignedBuffer> pack(const MatmulProblem& p, size_t bytes) {
    try {
      auto panels = std::make_shared<cpu::AlignedBuffer>(bytes);
      cpu::pack_weights(p, panels->data());
      return panels;
    } catch (const std::bad_alloc&) {
      return nullptr;  // products do without
    }
  }

  Pin pin(const WeightBuffer& buffer) const {
    for (const auto& [key, entry] : entries_)
      if (entry.pin && *entry.pin == buffer) return entry.pin;
    return std::make_shared<const WeightBuffer>(buffer);
  }

  Entries::iterator drop(Entries::iterator it, Dropped& dropped) {
    const auto next = std::next(it);
    bytes_ -= it->second.bytes;
    dropped.push_back(entries_.extract(it));
    return next;
  }
  template <class Condition>
  void drop_if(const Condition& condition, Dropped& dropped) {
    for (auto it = entries_.begin(); it != entries_.end();)
      it = condition(it->second) ? drop(it, dropped) : std::next(it);
  }

  // Drops weights that nothing but this cache refers to.
  void sweep(Dropped& dropped) {
    drop_if([](const Entry& e) { return e.pin ? e.pin->use_count() == 1 : e.seen.expired(); }, dropped);
  }
  void forget_unpacked(Dropped& dropped) {
    drop_if([](const Entry& e) { return !e.panels; }, dropped);
  }
  void clear(Dropped& dropped) {
    drop_if([](const Entry&) { return true; }, dropped);
  }

  // Whether `bytes` more fit, once the least recently used are dropped that were not used since `since`: a model larger
  // than the limit keeps the same part of its weights and does not pack all of them in turn.
  bool make_room(size_t bytes, uint64_t since, Dropped& dropped) {
    if (bytes_ + bytes > limit_) sweep(dropped);
    std::vector<std::pair<uint64_t, Key>> idle;
    size_t idle_bytes = 0;
    for (const auto& [key, entry] : entries_)
      if (entry.panels && entry.used < since) {
        idle.emplace_back(entry.used, key);
        idle_bytes += entry.bytes;
      }
    if (bytes_ - idle_bytes + bytes > limit_) return false;
    std::sort(idle.begin(), idle.end(), [](const auto& a, const auto& b) { return a.first < b.first; });
    for (const auto& [used, key] : idle) {
      if (bytes_ + bytes <= limit_) break;
      drop(entries_.find(key), dropped);
    }
    return true;
  }

  std::mutex mutex_;
  Entries entries_;
  MatmulTraits traits_;
  size_t limit_ = default_limit();
  size_t bytes_ = 0;  // of packed copies, made or being made
  uint64_t clock_ = 0;
};

// Never destroyed: MLX's allocator may be gone by then. A child of fork() starts afresh, as its parent's lock may be
// held.
std::atomic<Cache*> process_cache{nullptr};
std::atomic<Cache*> parents_cache{nullptr};  // reachable, so that leak checkers know it

#if defined(__unix__) || defined(__APPLE__)
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] {
  if (Cache* old = process_cache.exchange(nullptr, std::memory_order_relaxed)) parents_cache = old;
});
#endif

Cache& cache() {
  if (Cache* existing = process_cache.load(std::memory_order_acquire)) return *existing;
  Cache* created = new Cache;
  Cache* expected = nullptr;
  if (process_cache.compare_exchange_strong(expected, created, std::memory_order_acq_rel)) return *created;
  delete created;  // another thread was faster
  return *expected;
}

}  // namespace

std::shared_ptr<const cpu::AlignedBuffer> packed_weights_for(const MatmulProblem& p, const WeightBuffer& buffer) {
  return cache().find(p, buffer);
}

PackedWeights packed_weights() { return cache().status(); }
size_t set_packed_weights_limit(size_t bytes) { return cache().set_limit(bytes); }

}  // namespace mfa
