#include "support/metadata.h"

#include <algorithm>
#include <limits>
#include <stdexcept>

#include "attention/validate.h"

namespace mfa::testing {
namespace {

std::vector<int32_t> random_starts(Random& random, int32_t B, int32_t longest) {
  std::vector<int32_t> starts = {0};
  for (int32_t b = 0; b < B; ++b) starts.push_back(starts.back() + static_cast<int32_t>(random.integer(0, longest)));
  return starts;
}

// Lists of blocks and the same transposed.
void add_lists(Random& random, Metadata& m) {
  BlockListRef& l = m.p.blocks;
  l.block_q = l.block_k = 2;
  l.query_blocks = (m.p.Nq + 1) / 2;
  l.key_blocks = (m.p.Nk + 1) / 2;
  l.stride_b = random.chance(0.5) ? 1 : 0;
  const int32_t lists = l.stride_b ? m.p.B : 1;
  for (int32_t list = 0; list < lists; ++list) {
    std::vector<std::vector<int32_t>> of_key(l.key_blocks);
    m.offsets.push_back(static_cast<int64_t>(m.key_ids.size()));
    for (int32_t r = 0; r < l.query_blocks; ++r) {
      for (int32_t c = 0; c < l.key_blocks; ++c) {
        if (!random.chance(0.4)) continue;
        m.key_ids.push_back(c);
        of_key[c].push_back(r);
      }
      m.offsets.push_back(static_cast<int64_t>(m.key_ids.size()));
    }
    m.transposed_offsets.push_back(static_cast<int64_t>(m.query_ids.size()));
    for (const auto& rows : of_key) {
      m.query_ids.insert(m.query_ids.end(), rows.begin(), rows.end());
      m.transposed_offsets.push_back(static_cast<int64_t>(m.query_ids.size()));
    }
  }
  l.entries = static_cast<int64_t>(m.key_ids.size());
}

}  // namespace

AttentionProblem Metadata::problem() {
  AttentionProblem q = p;
  const auto data = [](auto& v) { return v.empty() ? nullptr : v.data(); };
  q.query_starts = data(query_starts);
  q.key_starts = data(key_starts);
  q.kv_lengths = data(lengths);
  q.pages.table = data(table);
  q.dropout_first_keys = data(dropout_keys);
  q.rope.cos = q.rope.sin = data(cos);
  q.rope.q_positions = data(q_positions);
  q.rope.k_positions = data(k_positions);
  q.blocks.offsets = data(offsets);
  q.blocks.key_ids = key_ids.data();
  q.blocks.transposed_offsets = data(transposed_offsets);
  q.blocks.query_ids = query_ids.data();
  return q;
}

std::string Metadata::error() {
  try {
    validate(problem(), "f");
  } catch (const std::invalid_argument& e) {
    return e.what();
  }
  return "";
}

Metadata sizes(int32_t B, int32_t Nq, int32_t Nk) {
  Metadata m;
  m.p.B = B;
  m.p.Hq = m.p.Hkv = 1;
  m.p.Nq = Nq;
  m.p.Nk = Nk;
  m.p.D = m.p.Dv = 1;
  return m;
}

Metadata random_metadata(Random& random) {
  const auto pick = [&](int low, int high) { return static_cast<int32_t>(random.integer(low, high)); };
  Metadata m = sizes(pick(1, 4), pick(0, 6), pick(0, 9));
  const int32_t B = m.p.B;
  if (random.chance(0.6)) {
    m.query_starts = random_starts(random, B, m.p.Nq);
    m.p.packed_queries = m.query_starts.back();
  }
  if (!m.query_starts.empty() && random.chance(0.5)) {
    m.key_starts = random_starts(random, B, m.p.Nk);
    m.p.packed_keys = m.key_starts.back();
  } else if (random.chance(0.7)) {
    m.p.pages = {nullptr, pick(0, 4), pick(0, 4), pick(1, 6)};
    m.p.Nk = static_cast<int32_t>(m.p.pages.table_stride) * m.p.pages.page_size;
    for (int32_t b = 0; b < B; ++b) {
      m.lengths.push_back(pick(0, m.p.Nk));
      const int32_t size = std::max(1, m.p.pages.page_size), used = (m.lengths.back() + size - 1) / size;
      for (int32_t t = 0; t < m.p.pages.table_stride; ++t)
        m.table.push_back(t < used ? pick(0, m.p.pages.pages - 1) : -1);
    }
  }
  if (m.lengths.empty() && random.chance(0.4)) {  // taken as the nearest length there is
    for (int32_t b = 0; b < B; ++b) m.lengths.push_back(pick(-2, m.p.Nk + 2));
  }
  if (random.chance(0.2)) {
    m.p.dropout_p = 0.5f;
    m.p.dropout_seed = random.bits();
    for (int32_t b = 0; b < B; ++b) m.dropout_keys.push_back(static_cast<int32_t>(random.bits()));
  }
  if (random.chance(0.4)) {
    m.p.rope.positions = 40;
    m.p.rope.rotary_dim = 2;
    m.cos.resize(40);
    m.p.rope.rotates_k = random.chance(0.5);
    for (int32_t b = 0; b < B; ++b) {
      m.q_positions.push_back(pick(0, 40 - m.p.Nq));
      m.k_positions.push_back(pick(0, 40 - m.p.Nk));
    }
  }
  if (random.chance(0.3) && m.p.Nq > 0 && m.p.Nk > 0) add_lists(random, m);
  return m;
}

void spoil(Random& random, Metadata& m) {
  const auto values = {-1, 0, 1, 3, 9, 100, std::numeric_limits<int32_t>::max(), std::numeric_limits<int32_t>::min()};
  std::vector<std::vector<int32_t>*> arrays;
  for (auto* v :
       {&m.query_starts, &m.key_starts, &m.lengths, &m.table, &m.q_positions, &m.k_positions, &m.key_ids, &m.query_ids})
    if (!v->empty()) arrays.push_back(v);
  if (!m.offsets.empty() && random.chance(0.3)) {
    auto& offsets = random.chance(0.5) ? m.offsets : m.transposed_offsets;
    offsets[random.integer(0, static_cast<int64_t>(offsets.size()) - 1)] =
        random.chance(0.5) ? random.pick(values) : std::numeric_limits<int64_t>::max();
  } else if (!arrays.empty()) {
    auto& v = *random.pick(arrays);
    v[random.integer(0, static_cast<int64_t>(v.size()) - 1)] = random.pick(values);
  }
}

}  // namespace mfa::testing
