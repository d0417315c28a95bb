// SPDX-License-Identifier: Apache-2.0

package config

import (
	"fmt"
	"strconv"
	"strings"

	"k8s.io/apimachinery/pkg/util/version"
)

// Version is the value of --version, as in Kubernetes' components: a boolean, raw,
// or the release to report.
type Version string

// What --version prints.
const (
	VersionText Version = "true"
	VersionRaw  Version = "raw"
)

// Asked is what --version prints; empty for nothing.
func (f *Flags) Asked() Version {
	if v := f.signalbox.version; v == VersionText || v == VersionRaw {
		return v
	}
	return ""
}

// release is the release that --version names; empty for none.
func (v Version) release() string {
	if strings.HasPrefix(string(v), "v") {
		return string(v)
	}
	return ""
}

// Set implements pflag.Value.
func (v *Version) Set(text string) error {
	if Version(text) == VersionRaw {
		*v = VersionRaw
		return nil
	}
	if strings.HasPrefix(text, "v") {
		_, err := version.ParseSemantic(text)
		*v = Version(text)
		return err
	}
	asked, err := strconv.ParseBool(text)
	if err != nil {
		return fmt.Errorf("neither raw nor a release such as v1.36.3: %w", err)
	}
	*v = ""
	if asked {
		*v = VersionText
	}
	return nil
}

// String implements pflag.Value.
func (v *Version) String() string { return string(*v) }

// Type implements pflag.Value.
func (*Version) Type() string { return "version" }
