#include "attention/tile_keys.h"

#include <algorithm>

#include "attention/visibility.h"

namespace mfa {
namespace {

constexpr uint8_t kKeySeen = 1, kQueryDone = 2;

// The key `j`, in whole pairs.
void append_to_pairs(int64_t j, KeyList& out) {
  const auto pad = [&](int64_t key) {
    out.key[out.count] = static_cast<int32_t>(key);
    out.padding[out.count++] = true;
    out.has_padding = true;
  };
  // The entry before is the first of a pair that this key does not complete, or this key has no first.
  if (out.count % 2 == 1 && out.key[out.count - 1] != j - 1) pad(out.key[out.count - 1] + int64_t{1});
  if (out.count % 2 == 0 && j % 2 == 1) pad(j - 1);
  out.key[out.count] = static_cast<int32_t>(j);
  out.padding[out.count++] = false;
}

// The keys [first, last).
void append(int64_t first, int64_t last, bool pairs, KeyList& out) {
  if (first >= last) return;
  if (pairs) {
    append_to_pairs(first++, out);  // those after it complete each other
  } else if (out.count > 0 && out.key[out.count - 1] + 1 != first) {
    out.contiguous = false;
  }
  int32_t* keys = out.key + out.count;
  const auto begin = static_cast<int32_t>(first), count = static_cast<int32_t>(last - first);
  for (int32_t i = 0; i < count; ++i) keys[i] = begin + i;
  std::fill_n(out.padding + out.count, count, false);
  out.count += count;
}

int32_t phase_size(const NeighbourhoodAxis& a) { return (a.size + a.dilation - 1) / a.dilation; }

}  // namespace

bool row_sees(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) { return sees(p, b, h, i, j); }
bool lists_show(const AttentionProblem& p, int32_t b, int32_t h, int32_t i, int32_t j) {
  return block_visible(p.blocks, b, h, i, j);
}

void key_positions(const Neighbourhood& n, const int32_t* tokens, int32_t count, int32_t* const (&u)[3]) {
  const NeighbourhoodAxis& last = n.axis[n.axes - 1];
  for (int32_t c = 0, along = 0; c < count; ++c) {                           // `along` the last axis
    if (c > 0 && tokens[c] == tokens[c - 1] + 1 && along + 1 < last.size) {  // the next of the same line
      ++along;
      for (int32_t x = 0; x + 1 < n.axes; ++x) u[x][c] = u[x][c - 1];
      u[n.axes - 1][c] = last.dilation == 1 ? along : along % last.dilation * phase_size(last) + along / last.dilation;
      continue;
    }
    int32_t token = tokens[c];
    along = token % last.size;
    for (int32_t x = n.axes - 1; x >= 0; --x) {
      const NeighbourhoodAxis& a = n.axis[x];
      const int32_t at = token % a.size;
      token /= a.size;
      u[x][c] = a.dilation == 1 ? at : at % a.dilation * phase_size(a) + at / a.dilation;
    }
  }
}

void query_spans(const Neighbourhood& n, const int32_t* tokens, int32_t count, int32_t* const (&begin)[3],
                 int32_t* const (&end)[3]) {
  int32_t last[3] = {-1, -1, -1};  // coordinates of the row before
  for (int32_t r = 0; r < count; ++r) {
    int32_t token = tokens[r];
    for (int32_t x = n.axes - 1; x >= 0; --x) {
      const NeighbourhoodAxis& a = n.axis[x];
      const int32_t c = token % a.size;
      token /= a.size;
      if (c == last[x]) {
        begin[x][r] = begin[x][r - 1];
        end[x][r] = end[x][r - 1];
        continue;
      }
      last[x] = c;
      const AxisWindow w = axis_window(n, a, c);
      const int32_t first = a.dilation == 1 ? 0 : w.phase * phase_size(a);
      begin[x][r] = first + w.begin;
      end[x][r] = first + w.end;
    }
  }
}

void TileKeys::select(int32_t b, const int32_t* query, const int32_t* head, int32_t rows) {
  if (p_.blocks.offsets) {
    const BlockListRef& l = p_.blocks;
    lists_.clear();
    for (int32_t r = 0; r < rows; ++r) {
      const int64_t row = (b * l.stride_b + head[r] * l.stride_h) * (l.query_blocks + 1) + query[r] / l.block_q;
      if (lists_.empty() || lists_.back() != row) lists_.push_back(row);
    }
    std::sort(lists_.begin(), lists_.end());
    lists_.erase(std::unique(lists_.begin(), lists_.end()), lists_.end());
  }
  const Neighbourhood& n = p_.neighbourhood;
  for (int32_t x = 0; x < n.axes; ++x) {
    axis_seen_[x].assign(static_cast<size_t>(n.axis[x].size), 0);
    axis_begin_[x] = n.axis[x].size;
    axis_end_[x] = 0;
  }
  for (int32_t r = 0; r < rows && n.axes > 0; ++r) {
    int32_t token = query[r];
    for (int32_t x = n.axes - 1; x >= 0; --x) {
      const NeighbourhoodAxis& a = n.axis[x];
      const int32_t c = token % a.size;
      token /= a.size;
      uint8_t* seen = axis_seen_[x].data();
      if (seen[c] & kQueryDone) continue;
      seen[c] |= kQueryDone;
      const AxisWindow w = axis_window(n, a, c);
      if (w.begin >= w.end) continue;
      for (int32_t t = w.begin; t < w.end; ++t) seen[w.phase + t * a.dilation] |= kKeySeen;
      axis_begin_[x] = std::min(axis_begin_[x], w.phase + w.begin * a.dilation);
      axis_end_[x] = std::max(axis_end_[x], w.phase + (w.end - 1) * a.dilation + 1);
    }
  }
}

void TileKeys::add_range(int64_t first, int64_t last, bool pairs, KeyList& out) const {
  const Neighbourhood& n = p_.neighbourhood;
  if (n.axes == 0) {
    append(first, last, pairs, out);
    return;
  }
  const int32_t x = n.axes - 1;  // lines of keys along the last axis
  const int64_t size = n.axis[x].size;
  const auto line_seen = [&](int64_t line) {
    for (int32_t y = x - 1; y >= 0; --y) {
      if (!(axis_seen_[y][static_cast<size_t>(line % n.axis[y].size)] & kKeySeen)) return false;
      line /= n.axis[y].size;
    }
    return true;
  };
  for (int64_t line = first / size; line * size < last; ++line) {
    if (!line_seen(line)) continue;
    const int64_t begin = std::max(first, line * size + axis_begin_[x]);
    const int64_t end = std::min(last, line * size + axis_end_[x]);
    const auto seen = [&](int64_t j) { return (axis_seen_[x][static_cast<size_t>(j - line * size)] & kKeySeen) != 0; };
    for (int64_t j = begin, run = begin; j < end; run = ++j) {
      while (j < end && seen(j)) ++j;
      append(run, j, pairs, out);
    }
  }
}

void TileKeys::list(int64_t first, int64_t last, bool pairs, KeyList& out) const {
  out.count = 0;
  out.contiguous = true;
  out.has_padding = false;
  const BlockListRef& l = p_.blocks;
  if (first >= last) {
  } else if (!l.offsets) {
    add_range(first, last, pairs, out);
  } else {
    // Key blocks that some list has, within these keys: at most one a key.
    const int64_t first_block = first / l.block_k, blocks = (last - 1) / l.block_k + 1 - first_block;
    bool shown[kKeyBlock + 1] = {};
    for (const int64_t row : lists_) {
      const int32_t* end = l.key_ids + l.offsets[row + 1];
      for (const int32_t* id = std::lower_bound(l.key_ids + l.offsets[row], end, first_block);
           id != end && *id < first_block + blocks; ++id)
        shown[*id - first_block] = true;
    }
    for (int64_t i = 0; i < blocks; ++i) {
      if (!shown[i]) continue;
      const int64_t begin = (first_block + i) * l.block_k;
      add_range(std::max(first, begin), std::min(last, begin + l.block_k), pairs, out);
    }
  }
  if (out.count == 0 || !pairs) return;
  const int32_t skip_first = out.padding[0], skip_last = out.padding[out.count - 1];
  out.contiguous = true;
  for (int32_t c = skip_first; out.contiguous && c < out.count - skip_last; ++c)
    out.contiguous = !out.padding[c] && out.key[c] == out.key[skip_first] + (c - skip_first);
  if (!out.contiguous) {
    if (out.count % 2 == 1) {
      out.key[out.count] = out.key[out.count - 1] + 1;
      out.padding[out.count++] = true;
      out.has_padding = true;
    }
    return;
  }
  // A run needs no padding: kernels take the halves of its ends themselves.
  if (skip_first) std::copy(out.key + 1, out.key + out.count, out.key);
  out.count -= skip_first + skip_last;
  std::fill_n(out.padding, out.count, false);
  out.has_padding = false;
}

}  // namespace mfa
