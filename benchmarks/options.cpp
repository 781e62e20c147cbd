#include "options.h"

#include <cstdlib>
#include <iostream>

#include "common/check.h"

namespace mfa::bench {
namespace {

std::string usage(const std::string& program, const std::string& purpose) {
  return concat(program, ": ", purpose, R"(
  --filter REGEX  only rows whose "group: work" matches
  --reps N        timed calls of a row (default 9, quick 3)
  --threads N     threads of the "all threads" columns (default: all that may be used)
  --isa NAME      instruction set (default: the best one)
  --quick         fewer and smaller rows: a look, not a measurement
  --json PATH     where to write the result (default build/bench/)",
                program, R"(.json; "" = nowhere)
  --list          print the rows and stop
)");
}

}  // namespace

Options parse_options(const std::string& program, const std::string& purpose, int argc, char** argv) {
  Options options;
  options.json = "build/bench/" + program + ".json";
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    const auto value = [&]() -> std::string {
      check(i + 1 < argc, program, "a value after ", name, "; got none");
      return argv[++i];
    };
    const auto count = [&] {
      const std::string text = value();
      char* end = nullptr;
      const long n = std::strtol(text.c_str(), &end, 10);
      check(!text.empty() && *end == '\0' && n >= 1 && n <= 4096, program, name, " expects a number from 1 to ", 4096,
            "; got \"", text, "\"");
      return static_cast<int>(n);
    };
    if (name == "--filter") {
      options.filter = value();
    } else if (name == "--reps") {
      options.reps = count();
    } else if (name == "--threads") {
      options.threads = count();
    } else if (name == "--isa") {
      options.isa = value();
    } else if (name == "--json") {
      options.json = value();
    } else if (name == "--quick") {
      options.quick = true;
    } else if (name == "--list") {
      options.list = true;
    } else if (name == "--help" || name == "-h") {
      std::cout << usage(program, purpose);
      std::exit(0);
    } else {
      check(false, program, "one of the options below; got \"", name, "\"\n", usage(program, purpose));
    }
  }
  return options;
}

}  // namespace mfa::bench
