// options.h: the command line that the benchmarks of the core share.
#pragma once

#include <string>

namespace mfa::bench {

struct Options {
  std::string filter, isa, json;
  int reps = 0, threads = 0;  // 0: the default
  bool quick = false, list = false;
};

// Reads the arguments of `program`, whose results go to build/bench/<program>.json by default. Prints the usage, headed
// by `purpose`, and exits for --help; throws std::invalid_argument for anything that it does not know.
Options parse_options(const std::string& program, const std::string& purpose, int argc, char** argv);

}  // namespace mfa::bench
