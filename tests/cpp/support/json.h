// json.h: reads the golden files. Objects, arrays, strings, numbers and booleans; nothing else is in them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace mfa::testing {

class Json {
 public:
  // Throws std::runtime_error on text that is not JSON.
  static Json parse(std::string_view text);
  // Reads `name` in the folder of golden data.
  static Json golden(const std::string& name);

  bool has(const std::string& key) const { return members_.contains(key); }
  const Json& operator[](const std::string& key) const { return members_.at(key); }  // throws if absent
  const Json& operator[](size_t i) const { return items_.at(i); }
  size_t size() const { return items_.size(); }
  auto begin() const { return items_.begin(); }
  auto end() const { return items_.end(); }
  const std::map<std::string, Json>& members() const { return members_; }

  const std::string& text() const { return text_; }  // a string's characters, a number's digits
  bool is_true() const { return text_ == "true"; }
  double number() const;  // also the strings "inf" and "-inf"
  uint64_t unsigned_integer() const;

  // The numbers of nested arrays, in order, and the extents of the nesting.
  std::vector<double> flat() const;
  std::vector<size_t> shape() const;

 private:
  friend class JsonReader;
  std::string text_;
  std::vector<Json> items_;
  std::map<std::string, Json> members_;
  bool is_array_ = false;
};

}  // namespace mfa::testing
