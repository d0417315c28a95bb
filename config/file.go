package config

import (
	"errors"
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/kube-proxy/config/v1alpha1"
	strictjson "sigs.k8s.io/json"
	"sigs.k8s.io/yaml"

	"signalbox/internal/readfile"
)

const kind = "KubeProxyConfiguration"

// readFile reads kube-proxy's configuration file, without defaults. ignored names
// unknown and duplicate fields: as with kube-proxy, they are not fatal.
func (f *Flags) readFile() (k *v1alpha1.KubeProxyConfiguration, ignored error, err error) {
	if f.text, err = os.ReadFile(f.file); err != nil {
		return nil, nil, fmt.Errorf("--config=%s: %w", f.file, readfile.Why(err))
	}
	if k, ignored, err = decode(f.text); err != nil {
		return nil, nil, fmt.Errorf("--config=%s: %w", f.file, err)
	}
	return k, ignored, nil
}

func decode(text []byte) (k *v1alpha1.KubeProxyConfiguration, ignored error, err error) {
	if err := checkKind(text); err != nil {
		return nil, nil, err
	}
	_, duplicates := yaml.YAMLToJSONStrict(text)
	asJSON, err := yaml.YAMLToJSON(text)
	if err != nil {
		return nil, nil, err
	}
	k = &v1alpha1.KubeProxyConfiguration{}
	unknown, err := strictjson.UnmarshalStrict(asJSON, k)
	return k, errors.Join(append(unknown, duplicates)...), err
}

// checkKind returns an error if the file has another kind or version.
func checkKind(text []byte) error {
	var head metav1.TypeMeta
	if err := yaml.Unmarshal(text, &head); err != nil {
		return fmt.Errorf("not YAML: %w", err)
	}
	want := v1alpha1.SchemeGroupVersion.String()
	switch {
	case head.APIVersion == "" && head.Kind == "":
		return fmt.Errorf("it has no apiVersion and no kind: it should begin with \"apiVersion: %s\" and \"kind: %s\"", want, kind)
	case head.APIVersion != want || head.Kind != kind:
		return fmt.Errorf("it is a %q of %q, and only a %s of %s is known: give kube-proxy's configuration file", head.Kind, head.APIVersion, kind, want)
	}
	return nil
}

// Write writes a configuration as --config reads it, for --write-config-to.
func Write(path string, k *v1alpha1.KubeProxyConfiguration) error {
	text, err := yaml.Marshal(k)
	if err != nil {
		return fmt.Errorf("writing kube-proxy's configuration: %w", err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("--write-config-to: %w; name a file in a directory that is there and can be written", err)
	}
	return nil
}
