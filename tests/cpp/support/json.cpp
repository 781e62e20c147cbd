#include "support/json.h"

#include <cctype>
#include <fstream>
#include <iterator>
#include <limits>
#include <stdexcept>

namespace mfa::testing {

class JsonReader {
 public:
  explicit JsonReader(std::string_view text) : text_(text) {}

  Json document() {
    Json value = read_value();
    if (peek() != '\0') fail();
    return value;
  }

 private:
  Json read_value() {
    Json value;
    const char first = peek();
    if (first == '{') {
      read_list('{', '}', [&] {
        if (peek() != '"') fail();
        std::string key = read_string();
        expect(':');
        value.members_.emplace(std::move(key), read_value());
      });
    } else if (first == '[') {
      value.is_array_ = true;
      read_list('[', ']', [&] { value.items_.push_back(read_value()); });
    } else if (first == '"') {
      value.text_ = read_string();
    } else {
      while (at_ < text_.size() && (std::isalnum(static_cast<unsigned char>(text_[at_])) || is_in_number(text_[at_])))
        value.text_ += text_[at_++];
      if (value.text_.empty()) fail();
    }
    return value;
  }

  template <typename ReadItem>
  void read_list(char open, char close, ReadItem read_item) {
    expect(open);
    if (peek() != close) {
      read_item();
      while (peek() == ',') {
        expect(',');
        read_item();
      }
    }
    expect(close);
  }

  std::string read_string() {  // the files hold no escapes
    expect('"');
    const size_t end = text_.find('"', at_);
    if (end == std::string_view::npos) fail();
    std::string result(text_.substr(at_, end - at_));
    if (result.find('\\') != std::string::npos) fail();
    at_ = end + 1;
    return result;
  }

  static bool is_in_number(char c) { return c == '-' || c == '+' || c == '.'; }

  char peek() {
    while (at_ < text_.size() && std::isspace(static_cast<unsigned char>(text_[at_]))) ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }

  void expect(char c) {
    if (peek() != c) fail();
    ++at_;
  }

  [[noreturn]] void fail() const { throw std::runtime_error("JSON: unexpected text at " + std::to_string(at_)); }

  std::string_view text_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text) { return JsonReader(text).document(); }

Json Json::golden(const std::string& name) {
  const std::string path = std::string(MFA_GOLDEN_DIR) + "/" + name;
  std::ifstream file(path);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  return parse(text);
}

double Json::number() const {
  if (text_ == "inf") return std::numeric_limits<double>::infinity();
  if (text_ == "-inf") return -std::numeric_limits<double>::infinity();
  return std::stod(text_);
}

uint64_t Json::unsigned_integer() const { return std::stoull(text_); }

std::vector<double> Json::flat() const {
  if (!is_array_) return {number()};
  std::vector<double> numbers;
  for (const Json& item : items_) {
    const std::vector<double> inner = item.flat();
    numbers.insert(numbers.end(), inner.begin(), inner.end());
  }
  return numbers;
}

std::vector<size_t> Json::shape() const {
  std::vector<size_t> extents;
  for (const Json* level = this; level->is_array_; level = &level->items_.front()) {
    extents.push_back(level->items_.size());
    if (level->items_.empty()) break;
  }
  return extents;
}

}  // namespace mfa::testing
