// The numbers of the environment: whole ones within their range, nothing for none, and an error for anything else.
#include "common/environment.h"

#include <gtest/gtest.h>
#include <stdlib.h>  // setenv is POSIX

#include <optional>
#include <stdexcept>
#include <string>

#include "common/check.h"

namespace mfa {
namespace {

struct Variable {
  const char* name;
  EnvironmentNumber (*read)();
  int64_t least, most;
};
constexpr Variable kVariables[] = {
    {"MFA_NUM_THREADS", environment_threads, 1, 4096},
    {"MFA_PACKED_WEIGHTS_MB", environment_packed_weights_megabytes, 0, int64_t{1} << 40},
};

TEST(Environment, WholeNumbersInTheirRangeAreRead) {
  for (const Variable& v : kVariables) {
    for (const int64_t number : {v.least, int64_t{64}, v.most}) {
      setenv(v.name, std::to_string(number).c_str(), 1);
      EXPECT_EQ(v.read().value, number) << v.name;
      EXPECT_EQ(v.read().error, "") << v.name;
      EXPECT_NO_THROW(check_environment());
    }
    unsetenv(v.name);
    EXPECT_EQ(v.read().value, std::nullopt);
    setenv(v.name, "", 1);
    EXPECT_EQ(v.read().value, std::nullopt);
    EXPECT_NO_THROW(check_environment());
    unsetenv(v.name);
  }
}

TEST(Environment, AnythingElseIsAnErrorThatNamesTheVariable) {
  for (const Variable& v : kVariables) {
    for (const std::string& text :
         {std::to_string(v.least - 1), std::to_string(v.most + 1), std::string("2.5"), std::string("2 "),
          std::string(" 2"), std::string("two"), std::string("0x10"), std::string("99999999999999999999")}) {
      setenv(v.name, text.c_str(), 1);
      EXPECT_EQ(v.read().value, std::nullopt) << text;
      EXPECT_EQ(v.read().error,
                concat("[", v.name, "] a whole number from ", v.least, " to ", v.most, " was expected; got ", text));
      EXPECT_THROW(check_environment(), std::invalid_argument) << text;
    }
    unsetenv(v.name);
  }
}

}  // namespace
}  // namespace mfa
