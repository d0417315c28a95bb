package config

import (
	"fmt"
	"os"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/kube-proxy/config/v1alpha1"
	"sigs.k8s.io/yaml"

	"signalbox/internal/readfile"
)

const kind = "KubeProxyConfiguration"

var (
	scheme         = newScheme()
	strictDecoder  = serializer.NewCodecFactory(scheme, serializer.EnableStrict).UniversalDeserializer()
	lenientDecoder = serializer.NewCodecFactory(scheme, serializer.DisableStrict).UniversalDeserializer()
)

func newScheme() *runtime.Scheme {
	s := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(s); err != nil {
		panic(err) // two kinds of one name: a mistake in this program
	}
	return s
}

// readFile reads kube-proxy's configuration file, without defaults. ignored
// says what in it is unknown or there twice: as with kube-proxy, that stops
// nothing.
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
	k = &v1alpha1.KubeProxyConfiguration{}
	_, _, err = strictDecoder.Decode(text, nil, k)
	if runtime.IsStrictDecodingError(err) {
		ignored = err
		k = &v1alpha1.KubeProxyConfiguration{}
		_, _, err = lenientDecoder.Decode(text, nil, k)
	}
	return k, ignored, err
}

// checkKind says in words what the decoder would say by printing the file.
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
	text, err := encode(k)
	if err != nil {
		return err
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		return fmt.Errorf("--write-config-to: %w; name a file in a directory that is there and can be written", err)
	}
	return nil
}

// encode is a configuration as YAML, apiVersion and kind included.
func encode(k *v1alpha1.KubeProxyConfiguration) ([]byte, error) {
	text, err := yaml.Marshal(k)
	if err != nil {
		return nil, fmt.Errorf("writing kube-proxy's configuration: %w", err)
	}
	return text, nil
}
