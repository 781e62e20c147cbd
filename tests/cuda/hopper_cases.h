// hopper_cases.h: what the standalone Hopper programs check and time, and their command line.
#pragma once

#include <cstring>

#include "hopper_harness.h"

namespace harness {

// [check | quick | soak] [time] [modified] [columns...]. `modified`: also problems with modifiers of scores.
struct Options {
  bool check = false, quick = false, time = false, modified = false;
  int repeats = 3;  // of a problem whose bits must not change
  std::vector<int> columns;

  Options(int argc, char** argv, int first) {
    for (int i = first; i < argc; ++i) {
      const std::string a = argv[i];
      if (a == "check")
        check = true;
      else if (a == "quick")
        check = quick = true;
      else if (a == "soak")
        check = quick = true, repeats = 100;
      else if (a == "time")
        time = true;
      else if (a == "modified")
        modified = true;
      else
        columns.push_back(std::atoi(argv[i]));
    }
    if (columns.empty()) columns = {64, 96, 128, 192, 256};  // the forward also knows 512 and 576
  }
};

constexpr int widest_values = 512;
inline void narrow_values(std::vector<Case>& cases) {
  for (Case& c : cases)
    if (c.value_columns() > widest_values) c.Dv = widest_values;
}

// With visibility and sinks only; a quick run takes few.
inline std::vector<Case> plain_cases(int D, bool quick) {
  std::vector<Case> cases = {
      {2, 4, 2, 333, 517, D, false},
      {2, 4, 2, 517, 333, D, true},
      {3, 4, 2, 300, 411, D, true, -1, -1, true, true, true},
  };
  if (quick) return cases;
  for (const Case& c : std::initializer_list<Case>{
           {1, 1, 1, 128, 128, D, false},
           {1, 2, 1, 256, 384, D, true},
           {2, 4, 1, 200, 1000, D, true},
           {1, 2, 2, 1, 1, D, true},
           {1, 2, 2, 700, 700, D, false, 100, 50},
           {1, 2, 2, 700, 900, D, true, 130},
           {3, 2, 1, 300, 411, D, true, -1, -1, true},
           {3, 4, 2, 300, 411, D, false, 64, 10, true, true},
           {2, 2, 2, 300, 400, D, false, -1, -1, true, false, true},
           {2, 2, 1, 500, 500, D, true, -1, -1, false, false, true},
           {2, 3, 3, 1024, 64, D, false, 5, 5},
           {1, 40, 8, 640, 640, D, true},
           {1, 2, 2, 260, 400, D - 8, true},
           {1, 2, 1, 1100, 2500, D, true},
           {1, 48, 24, 200, 2100, D, false},
           {2, 4, 2, 700, 2300, D, false, 400, 300},
           {3, 2, 2, 500, 2300, D, true, 900, -1, true, true, true},
       })
    cases.push_back(c);
  Case c{2, 4, 2, 300, 300, D, true};
  c.Dv = 64;
  cases.push_back(c);
  c = {2, 4, 4, 300, 300, D > 64 ? 64 : 32, true};
  c.Dv = std::min(D, widest_values);
  cases.push_back(c);
  c = {2, 4, 2, 200, 300, D, false};
  c.broadcast = true;
  cases.push_back(c);
  c = {1, 2, 2, 200, 300, D, true};
  c.far = true;
  cases.push_back(c);
  return cases;
}

// Each modifier alone, masks in words (Nk a multiple of 16) and not, poison that a mask hides, and everything at once.
inline std::vector<Case> modified_cases(int D) {
  std::vector<Case> cases;
  const auto add = [&](Case c, const auto& change) {
    change(c);
    cases.push_back(c);
  };
  const Case causal{2, 4, 2, 333, 417, D, true}, full{2, 4, 2, 333, 417, D, false};
  add(causal, [](Case& c) { c.softcap = 5; });
  add(causal, [](Case& c) { c.alibi = true; });
  add(causal, [](Case& c) { c.bias = true; });
  add(full, [](Case& c) { c.bias = true, c.Nk = 416; });
  add(full, [](Case& c) { c.mask = true; });
  add(full, [](Case& c) { c.mask = true, c.Nk = 416; });
  add(full, [](Case& c) { c.mask = c.poison = true; });
  add(full, [](Case& c) { c.mask = c.poison = true, c.Nk = 416; });
  add(causal, [](Case& c) { c.dropout = .3f; });
  const Case everything{3, 4, 2, 333, 417, D, true, 200, -1, true, true, true, 8, true, true, true, .2f};
  add(everything, [](Case& c) { c.alibi = false; });
  add(everything, [](Case& c) { c.poison = false, c.Nk = 416; });
  add({3, 4, 2, 300, 1040, D, true, 300, -1, true, true, true}, [](Case& c) { c.mask = true; });
  return cases;
}

// The problems to time: 4k and 16k keys, or 4k with one modifier each.
inline std::vector<Case> timed_cases(int D, bool modified) {
  std::vector<Case> cases;
  if (!modified) {
    for (auto [B, N] : {std::pair{4, 4096}, std::pair{1, 16384}})
      for (bool causal : {false, true}) cases.push_back({B, 16, 16, N, N, D, causal});
    narrow_values(cases);
    return cases;
  }
  for (int which = 0; which < 5; ++which) {
    Case c{4, 16, 16, 4096, 4096, D, which == 2};
    c.mask = which == 0, c.bias = which == 1, c.alibi = which == 2, c.softcap = which == 3 ? 20 : 0;
    c.dropout = which == 4 ? .1f : 0;
    cases.push_back(c);
  }
  narrow_values(cases);
  return cases;
}

inline std::string text_of(const Case& c) {
  char text[256];
  std::snprintf(
      text, sizeof text,
      "B%d Hq%d Hkv%d Nq%d Nk%d D%d,%d causal%d window(%d,%d) len%d sink%d poison%d cap%g alibi%d bias%d mask%d "
      "drop%g",
      c.B, c.Hq, c.Hkv, c.Nq, c.Nk, c.D, c.value_columns(), c.causal, c.left, c.right, c.lengths, c.sinks, c.poison,
      c.softcap, c.alibi, c.bias, c.mask, c.dropout);
  return text;
}

template <class T>
bool same_bits(const std::vector<T>& a, const std::vector<T>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
}

// Prints and returns the number of failures. `verify(type, case)` checks one problem with elements of that type.
template <class Verify>
int check_all(const Options& options, const Verify& verify) {
  int failures = 0;
  for (int D : options.columns) {
    std::vector<Case> cases = plain_cases(D, options.quick);
    std::vector<Case> half = {cases[0], cases[1], cases[2]};
    if (options.modified)
      for (const Case& c : modified_cases(D)) {
        cases.push_back(c);
        half.push_back(c);
      }
    narrow_values(cases);
    narrow_values(half);
    for (const Case& c : cases) failures += !verify(__nv_bfloat16{}, c);
    if (options.quick) continue;
    for (const Case& c : half) failures += !verify(__half{}, c);
  }
  std::printf("%d failures\n", failures);
  return failures;
}

}  // namespace harness
