{{/* Name of every object. */}}
{{- define "zspire.name" -}}
{{ .Values.resourceName | default "ztunnel" }}
{{- end }}

{{- define "zspire.serviceAccount" -}}
{{ .Values.serviceAccount.name | default (include "zspire.name" .) }}
{{- end }}

{{/* A value that `global` may hold for several charts; what is set for this one wins, also if it is empty or false. Call:
     (list $ "hub"). */}}
{{- define "zspire.shared" -}}
{{- $root := index . 0 }}{{ $key := index . 1 }}
{{- $value := index $root.Values $key }}
{{- if kindIs "invalid" $value }}{{ $value = index $root.Values.global $key }}{{ end }}
{{- if not (kindIs "invalid" $value) }}{{ $value }}{{ end }}
{{- end }}

{{- define "zspire.platform" -}}
{{ include "zspire.shared" (list . "platform") }}
{{- end }}

{{- define "zspire.clusterName" -}}
{{ coalesce .Values.multiCluster.clusterName (.Values.global.multiCluster).clusterName "Kubernetes" }}
{{- end }}

{{- define "zspire.image" -}}
{{- if contains "/" .Values.image -}}
{{ .Values.image }}
{{- else -}}
{{- $hub := include "zspire.shared" (list . "hub") }}
{{- with $hub }}{{ . }}/{{ end }}{{ .Values.image }}:{{ .Values.tag | default .Chart.AppVersion }}{{ with .Values.variant }}-{{ . }}{{ end }}
{{- end -}}
{{- end }}

{{- define "zspire.pullSecrets" -}}
{{- with .Values.imagePullSecrets | default .Values.global.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{/* What tells this release's pods from others', Istio's ztunnel among them. */}}
{{- define "zspire.selector" -}}
app: ztunnel
app.kubernetes.io/name: zspire
app.kubernetes.io/instance: {{ .Release.Name | quote }}
{{- end }}

{{- define "zspire.chartLabels" -}}
app.kubernetes.io/name: zspire
app.kubernetes.io/instance: {{ .Release.Name | quote }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service | quote }}
app.kubernetes.io/part-of: istio
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" | trunc 63 | trimSuffix "-" }}
{{- end }}

{{/* Name, labels and annotations of an object. */}}
{{- define "zspire.metadata" -}}
name: {{ include "zspire.name" . }}
{{ include "zspire.describe" . }}
{{- end }}

{{- define "zspire.describe" -}}
{{- $chart := include "zspire.chartLabels" . | fromYaml }}
{{- $owner := dict "install.operator.istio.io/owning-resource" (.Values.ownerName | default "unknown") -}}
labels:
  {{- merge $chart .Values.labels $owner | toYaml | nindent 2 }}
{{- $annotations := deepCopy .Values.annotations }}
{{- with .Values.revision }}{{ $_ := set $annotations "istio.io/rev" . }}{{ end }}
{{- with $annotations }}
annotations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{- define "zspire.inCluster" -}}
{{- if has .Values.resourceScope (list "all" "cluster") }}yes{{ end }}
{{- end }}

{{- define "zspire.inNamespace" -}}
{{- if has .Values.resourceScope (list "all" "namespace") }}yes{{ end }}
{{- end }}

{{/* Whether the agent is asked about processes, which the proxy then has to see. */}}
{{- define "zspire.byProcess" -}}
{{- $source := .Values.identitySource }}
{{- $reference := .Values.spire.reference | default (ternary "pid" "pod" (eq $source "spire-delegated")) }}
{{- if and (hasPrefix "spire-" $source) (eq $reference "pid") (not .Values.spire.unattestedSelectors) }}yes{{ end }}
{{- end }}

{{/* Whether the Workload API's socket is mounted. */}}
{{- define "zspire.workloadApi" -}}
{{- if and (hasPrefix "spire-" .Values.identitySource) .Values.spire.workloadApi.enabled }}yes{{ end }}
{{- end }}

{{/* What the schema cannot say: settings that contradict each other. */}}
{{- define "zspire.check" -}}
{{- $spire := .Values.spire }}{{ $source := .Values.identitySource }}
{{- if and (eq $source "spire-broker") (not $spire.workloadApi.enabled) }}
{{- fail "identitySource=spire-broker needs spire.workloadApi.enabled: the proxy shows the agent its own SVID" }}
{{- end }}
{{- if and (eq $source "spire-delegated") (eq $spire.reference "pod") }}
{{- fail "spire.reference=pod: the Delegated Identity API takes processes only; use identitySource=spire-broker" }}
{{- end }}
{{- if and $spire.unattestedSelectors (ne $source "spire-delegated") }}
{{- fail "spire.unattestedSelectors is for identitySource=spire-delegated alone" }}
{{- end }}
{{- if and $spire.idTemplate (not (hasPrefix "spire-" $source)) }}
{{- fail "spire.idTemplate is for identities from SPIRE: a CA of Istio's protocol issues Istio's pattern only" }}
{{- end }}
{{- if and $spire.broker.impersonation (not .Values.trustDomain) }}
{{- fail "spire.broker.impersonation names the proxy by its SPIFFE ID: set trustDomain" }}
{{- end }}
{{- end }}
