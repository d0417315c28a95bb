// SPDX-License-Identifier: Apache-2.0

package conformance

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// BreakSourceRanges writes an overlay for `go test -overlay` with which the shared rule
// about source ranges (nft/access) lets every client pass. Root is the repository, and
// dir takes the files.
func BreakSourceRanges(root, dir string) (overlay string, err error) {
	const file, rule = "nft/access/rules.go", "AllowedSources), nft.Drop())"
	path, err := filepath.Abs(filepath.Join(root, file))
	if err != nil {
		return "", err
	}
	source, err := os.ReadFile(path)
	if err != nil {
		return "", err
	}
	broken := strings.Replace(string(source), rule, "AllowedSources), nft.Return())", 1)
	if broken == string(source) {
		return "", fmt.Errorf("%s does not contain %q any more", file, rule)
	}
	text, err := json.Marshal(map[string]map[string]string{"Replace": {path: filepath.Join(dir, "rules.go")}})
	if err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(dir, "rules.go"), []byte(broken), 0o644); err != nil {
		return "", err
	}
	overlay = filepath.Join(dir, "overlay.json")
	return overlay, os.WriteFile(overlay, text, 0o644)
}
