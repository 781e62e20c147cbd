// upcoming_rows-inl.h: what is read next is fetched into the caches while something else is computed.

namespace mfa::cpu::MFA_ISA {
namespace {

// Rows that are needed soon, runs of them as one, fetched a few lines at a time between the multiply-adds: more at once
// would fill the queue of outstanding misses and hold up the loads. They are cut into kStreams parts of as many lines
// that are fetched side by side, each in the order of memory: memory answers that faster than one sequence of lines,
// and half as fast where lines come out of order.
class UpcomingRows {
 public:
  void Clear() { count_ = 0; }
  // `rows` rows of `bytes` > 0, `step` bytes apart. What does not fit is not fetched.
  HWY_INLINE void Add(const void* first, int rows, ptrdiff_t step, size_t bytes) {
    const char* at = static_cast<const char*>(first);
    const bool dense = step == static_cast<ptrdiff_t>(bytes);
    if (dense) bytes *= static_cast<size_t>(rows);
    for (int r = 0; r < (dense ? 1 : rows); ++r, at += step) {
      if (count_ > 0 && runs_[count_ - 1].end == at) {
        runs_[count_ - 1].end += bytes;
      } else if (count_ < kCapacity) {
        runs_[count_++] = {at - reinterpret_cast<uintptr_t>(at) % kLine, at + bytes};
      }
    }
  }
  // The rows are to be fetched during `work`, in any unit.
  void Spread(int64_t work) {
    int64_t lines = 0;
    for (int i = 0; i < count_; ++i) lines += runs_[i].lines();
    left_ = (lines + kStreams - 1) / kStreams;
    rate_ = (left_ << kShift) / Max<int64_t>(work, 1) + 1;
    credit_ = 0;
    int run = 0;
    int64_t before = 0;  // lines of the runs before it
    for (int s = 0; s < kStreams && left_ > 0; ++s) {
      for (; run + 1 < count_ && before + runs_[run].lines() <= s * left_; ++run) before += runs_[run].lines();
      streams_[s] = {runs_[run].first + (s * left_ - before) * kLine, runs_[run].end, run};
    }
  }
  // Fetches what falls to a part of the work into the second cache, or into the first: that suits decode, where little
  // is computed with a row.
  HWY_INLINE void Fetch(int work) { FetchInto<2>(work); }
  HWY_INLINE void FetchNear(int work) { FetchInto<3>(work); }

 private:
  template <int kLocality>
  HWY_INLINE void FetchInto(int work) {
    credit_ += rate_ * work;
    if (credit_ < int64_t{1} << kShift) return;
    const int64_t due = Min(credit_ >> kShift, left_);  // of each stream
    credit_ &= (int64_t{1} << kShift) - 1;
    left_ -= due;
    MFA_UNROLL
    for (Stream& stream : streams_) {
      for (int64_t i = 0; i < due; ++i) {
        __builtin_prefetch(stream.line, 0, kLocality);
        stream.line += kLine;
        if (stream.line < stream.end) continue;
        if (stream.run + 1 < count_) ++stream.run;
        stream.line = runs_[stream.run].first;
        stream.end = runs_[stream.run].end;
      }
    }
  }

  static constexpr ptrdiff_t kLine = 64;
  static constexpr int kStreams = 4, kCapacity = 2 * kKeyBlock + 2 * kGroupRows, kShift = 20;
  struct Run {
    const char *first, *end;  // from the start of a line
    int64_t lines() const { return (end - first + kLine - 1) / kLine; }
  };
  struct Stream {
    const char *line, *end;  // the next line, and the end of its run
    int run;
  };
  Run runs_[kCapacity];
  Stream streams_[kStreams];
  int count_ = 0;
  int64_t left_ = 0;               // lines of each stream
  int64_t rate_ = 0, credit_ = 0;  // lines of each stream << kShift: for a unit of work, and due
};

}  // namespace
}  // namespace mfa::cpu::MFA_ISA
